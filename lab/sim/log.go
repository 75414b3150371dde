package sim

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// Log is what happened in a run, with its times.
type Log struct {
	mu    sync.Mutex
	begin time.Time
	lines []string
}

const maxLines = 5000

// Add notes one line.
func (l *Log) Add(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.begin.IsZero() {
		l.begin = time.Now()
	}
	if len(l.lines) < maxLines {
		l.lines = append(l.lines, fmt.Sprintf("%8.3fs ", time.Since(l.begin).Seconds())+fmt.Sprintf(format, args...))
	}
}

// String gives all lines.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}

// handler writes a node's log into a Log.
type handler struct {
	log   *Log
	who   string
	attrs string
}

func (h *handler) Enabled(context.Context, slog.Level) bool { return true }

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	text := r.Message + h.attrs
	r.Attrs(func(a slog.Attr) bool {
		text += " " + a.String()
		return true
	})
	h.log.Add("%s: %s", h.who, text)
	return nil
}

func (h *handler) WithAttrs(as []slog.Attr) slog.Handler {
	g := *h
	for _, a := range as {
		g.attrs += " " + a.String()
	}
	return &g
}

func (h *handler) WithGroup(string) slog.Handler { return h }

// Logger is a logger of that node.
func (l *Log) Logger(who string) *slog.Logger { return slog.New(&handler{log: l, who: who}) }
