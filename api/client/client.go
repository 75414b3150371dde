// Package client speaks the API of one daemon, through the socket in its state
// directory. The CLI uses nothing else.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"syscall"

	"forerun/api"
	"forerun/block"
)

// Client speaks to one daemon.
type Client struct {
	http *http.Client
	dir  string
}

// New returns a client of the daemon whose state directory is stateDir.
// Nothing is sent yet.
func New(stateDir string) *Client {
	path := filepath.Join(stateDir, api.SocketName)
	return &Client{dir: stateDir, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}}
}

// Node describes the daemon.
func (c *Client) Node(ctx context.Context) (n api.Node, err error) {
	return n, c.do(ctx, http.MethodGet, api.PathNode, nil, &n)
}

// Volumes lists the daemon's volumes.
func (c *Client) Volumes(ctx context.Context) (v []api.Volume, err error) {
	return v, c.do(ctx, http.MethodGet, api.PathVolumes, nil, &v)
}

// Volume describes one volume; KindNotFound when there is none of that name.
func (c *Client) Volume(ctx context.Context, name string) (v api.Volume, err error) {
	return v, c.do(ctx, http.MethodGet, path(api.PathVolume, name), nil, &v)
}

// Fill changes the background transfer of a volume and returns its new status.
func (c *Client) Fill(ctx context.Context, name string, req api.FillRequest) (v api.Volume, err error) {
	return v, c.do(ctx, http.MethodPost, path(api.PathFill, name), req, &v)
}

// Cutover starts a cut-over and returns at once; Volume shows how it goes.
func (c *Client) Cutover(ctx context.Context, name string, req api.CutoverRequest) (v api.Volume, err error) {
	return v, c.do(ctx, http.MethodPost, path(api.PathCutover, name), req, &v)
}

// CancelCutover gives up a cut-over that has not switched yet.
func (c *Client) CancelCutover(ctx context.Context, name string) (v api.Volume, err error) {
	return v, c.do(ctx, http.MethodDelete, path(api.PathCutover, name), nil, &v)
}

// Abort calls a move off. It may return before the end; Volume shows how it goes.
func (c *Client) Abort(ctx context.Context, name string, req api.AbortRequest) (v api.Volume, err error) {
	return v, c.do(ctx, http.MethodPost, path(api.PathAbort, name), req, &v)
}

// Checkpoint cuts a checkpoint now and returns when it is stored at the source's site.
func (c *Client) Checkpoint(ctx context.Context, name string) (v api.Volume, err error) {
	return v, c.do(ctx, http.MethodPost, path(api.PathCheckpoint, name), struct{}{}, &v)
}

// Discard removes a test clone and everything it wrote.
func (c *Client) Discard(ctx context.Context, name string, req api.DiscardRequest) (v api.Volume, err error) {
	return v, c.do(ctx, http.MethodPost, path(api.PathDiscard, name), req, &v)
}

// Failover makes the other frontend primary, and returns when it is.
func (c *Client) Failover(ctx context.Context, name string, req api.FailoverRequest) (v api.Volume, err error) {
	return v, c.do(ctx, http.MethodPost, path(api.PathFailover, name), req, &v)
}

// Policy says what becomes of the workload's changes from now on.
func (c *Client) Policy(ctx context.Context, name string, req api.PolicyRequest) (v api.Volume, err error) {
	return v, c.do(ctx, http.MethodPost, path(api.PathPolicy, name), req, &v)
}

// Limits replaces the limits of the node and returns what is in force; no
// rules remove them. They hold until the daemon is restarted.
func (c *Client) Limits(ctx context.Context, req api.LimitsRequest) (l api.Limits, err error) {
	return l, c.do(ctx, http.MethodPut, api.PathLimits, req, &l)
}

func path(pattern, volume string) string {
	return strings.Replace(pattern, "{volume}", url.PathEscape(volume), 1)
}

func (c *Client) do(ctx context.Context, method, p string, in, out any) error {
	const op = "api"
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return block.E(op, p, block.KindInvalid, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://forerun"+p, body)
	if err != nil {
		return block.E(op, p, block.KindInvalid, err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return block.E(op, c.dir, block.KindUnavailable,
				fmt.Errorf("no daemon answers in this state directory; is it running, and was --state the same?"))
		}
		return block.E(op, c.dir, block.KindNone, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		var e struct {
			Title, Detail string
			Errors        []struct{ Message, Location string }
		}
		text := resp.Status
		if json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&e) == nil && e.Detail != "" {
			text = e.Detail
			for _, d := range e.Errors {
				text += "; " + d.Location + ": " + d.Message
			}
		} else if resp.StatusCode == http.StatusNotFound {
			text = fmt.Sprintf("the daemon does not know %s %s; does it run the same version?", method, p)
		}
		return &block.Error{Op: op, Kind: kind(resp.StatusCode), Err: errors.New(text)}
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return block.E(op, p, block.KindIO, err)
	}
	return nil
}

func kind(status int) block.Kind {
	switch status {
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		return block.KindInvalid
	case http.StatusNotFound:
		return block.KindNotFound
	case http.StatusConflict:
		return block.KindBusy
	case http.StatusForbidden:
		return block.KindDenied
	case http.StatusServiceUnavailable:
		return block.KindUnavailable
	case http.StatusInsufficientStorage:
		return block.KindNoSpace
	case http.StatusNotImplemented:
		return block.KindUnsupported
	}
	return block.KindIO
}
