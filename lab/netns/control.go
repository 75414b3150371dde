package netns

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Do runs one order in words and returns the answer:
//
//	stall 60s | rate 100mbit | delay 20ms | loss 0.01 | queue 100ms | partition on|off | stats
//
// Units of rate are those of ParseRate. It is what a Control socket speaks.
func (l *Line) Do(order string) (string, error) {
	f := strings.Fields(order)
	if len(f) == 0 {
		return "", fmt.Errorf("empty order")
	}
	if f[0] == "stats" && len(f) == 1 {
		s := l.Stats()
		return fmt.Sprintf("to-target %+v to-source %+v", s.ToTarget, s.ToSource), nil
	}
	if len(f) != 2 {
		return "", fmt.Errorf("%q needs one value", f[0])
	}
	link := l.Link()
	var err error
	switch f[0] {
	case "stall":
		var d time.Duration
		if d, err = time.ParseDuration(f[1]); err == nil {
			l.Stall(d)
		}
		return "ok", err
	case "partition":
		if f[1] != "on" && f[1] != "off" {
			return "", fmt.Errorf("partition takes on or off, not %q", f[1])
		}
		l.Partition(f[1] == "on")
		return "ok", nil
	case "rate":
		link.Rate, err = ParseRate(f[1])
	case "delay":
		link.Delay, err = time.ParseDuration(f[1])
	case "queue":
		link.Queue, err = time.ParseDuration(f[1])
	case "loss":
		link.Loss, err = strconv.ParseFloat(f[1], 64)
		if err == nil && (link.Loss < 0 || link.Loss >= 1) {
			err = fmt.Errorf("loss %v is not in [0, 1)", link.Loss)
		}
	default:
		err = fmt.Errorf("unknown order %q", f[0])
	}
	if err != nil {
		return "", err
	}
	l.Set(link)
	return "ok", nil
}

// ParseRate reads "100mbit", "1gbit", "500kbit" or plain bytes per second
// ("12500000"), and returns bytes per second.
func ParseRate(s string) (int64, error) {
	unit := 1.0
	for _, u := range []struct {
		name  string
		bytes float64
	}{{"gbit", 125e6}, {"mbit", 125e3}, {"kbit", 125}} {
		if n, ok := strings.CutSuffix(s, u.name); ok {
			s, unit = n, u.bytes
			break
		}
	}
	v, err := strconv.ParseFloat(s, 64)
	if err != nil || v < 0 || v*unit > 1e15 {
		return 0, fmt.Errorf("%q is not a rate; write 100mbit, 1gbit, 500kbit or bytes per second", s)
	}
	return int64(v * unit), nil
}

// Control listens on a unix socket at path and obeys the orders that come in,
// one a line. It ends with the returned Close.
func (l *Line) Control(path string) (io.Closer, error) {
	os.Remove(path)
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	c := &control{Listener: ln, conns: map[net.Conn]struct{}{}}
	c.wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			c.mu.Lock()
			c.conns[conn] = struct{}{}
			c.mu.Unlock()
			c.wg.Go(func() { c.serve(l, conn) })
		}
	})
	return c, nil
}

type control struct {
	net.Listener
	wg    sync.WaitGroup
	mu    sync.Mutex
	conns map[net.Conn]struct{}
}

func (c *control) serve(l *Line, conn net.Conn) {
	defer func() {
		conn.Close()
		c.mu.Lock()
		delete(c.conns, conn)
		c.mu.Unlock()
	}()
	for in := bufio.NewScanner(conn); in.Scan(); {
		answer, err := l.Do(in.Text())
		if err != nil {
			answer = "error: " + err.Error()
		}
		if _, err := fmt.Fprintln(conn, answer); err != nil {
			return
		}
	}
}

// Close ends the control socket and its connections.
func (c *control) Close() error {
	err := c.Listener.Close()
	c.mu.Lock()
	for conn := range c.conns {
		conn.Close()
	}
	c.mu.Unlock()
	c.wg.Wait()
	return err
}

// Order sends one order to the Control socket at path and returns the answer.
func Order(path, order string) (string, error) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if _, err := fmt.Fprintln(conn, order); err != nil {
		return "", err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return "", err
	}
	answer = strings.TrimSpace(answer)
	if e, ok := strings.CutPrefix(answer, "error: "); ok {
		return "", fmt.Errorf("%s", e)
	}
	return answer, nil
}
