package pair

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"forerun/lab/rig"
)

// Cluster is a PostgreSQL of its own, run as the user postgres.
type Cluster struct {
	// Data is its directory, Sock that of its socket and logs.
	Data, Sock string

	bin  string
	cred *syscall.Credential
	proc *rig.Proc
}

// NewCluster finds PostgreSQL and lays a cluster out; nothing is written yet.
func NewCluster(data, sock string) (*Cluster, error) {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if len(found) == 0 {
		return nil, errors.New("PostgreSQL is missing; make setup installs it")
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, err
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	c := &Cluster{Data: data, Sock: sock, bin: filepath.Dir(slices.Max(found)),
		cred: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	for _, d := range []string{data, sock} {
		if err := errors.Join(os.MkdirAll(d, 0o700), os.Chown(d, int(uid), int(gid))); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// command runs a program of PostgreSQL as its user.
func (c *Cluster) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := rig.Local(ctx, filepath.Join(c.bin, name), args...)
	cmd.SysProcAttr.Credential = c.cred
	cmd.Dir = c.Sock
	cmd.Env = append(os.Environ(), "HOME="+c.Sock, "PGHOST="+c.Sock, "PGUSER=postgres", "LC_ALL=C")
	return cmd
}

// Run runs a program of PostgreSQL to its end and returns what it printed.
func (c *Cluster) Run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := c.command(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// Init makes the cluster's files.
func (c *Cluster) Init(ctx context.Context) error {
	_, err := c.Run(ctx, "initdb", "--pgdata", c.Data, "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--data-checksums")
	return err
}

// Start starts the server and waits until it takes connections, which after a
// crash is when it has recovered.
func (c *Cluster) Start(ctx context.Context) (err error) {
	c.proc, err = rig.Launch(c.command(context.WithoutCancel(ctx), "postgres", "-D", c.Data, "-k", c.Sock, "-c", "listen_addresses=",
		"-c", "shared_buffers=32MB", "-c", "max_wal_size=128MB", "-c", "log_checkpoints=off"), "postgres", filepath.Join(c.Sock, "log"))
	if err != nil {
		return err
	}
	return c.proc.Until(ctx, 2*time.Minute, "taking connections", func() bool {
		p, err := c.Connect(ctx)
		if err == nil {
			p.Close()
		}
		return err == nil
	})
}

// Stop ends the server: with a checkpoint, or at once, so that it must recover.
func (c *Cluster) Stop(immediate bool) error {
	if c.proc == nil {
		return nil
	}
	sig := syscall.SIGINT
	if immediate {
		sig = syscall.SIGQUIT
	}
	c.proc.Signal(sig)
	select {
	case <-c.proc.Exited():
	case <-time.After(time.Minute):
		c.proc.Kill()
		return c.proc.Trouble("did not end within a minute")
	}
	c.proc = nil
	return nil
}

// PG is one connection to a Cluster. It speaks the simple query protocol,
// which says exactly when a commit was acknowledged.
type PG struct {
	conn net.Conn
	in   *bufio.Reader
}

// Connect opens a connection.
func (c *Cluster) Connect(ctx context.Context) (*PG, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(c.Sock, ".s.PGSQL.5432"))
	if err != nil {
		return nil, err
	}
	p := &PG{conn: conn, in: bufio.NewReader(conn)}
	body := binary.BigEndian.AppendUint32(nil, 196608) // protocol 3.0
	body = append(body, "user\x00postgres\x00database\x00postgres\x00\x00"...)
	if _, err = conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(4+len(body))), body...)); err == nil {
		_, err = p.answer()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return p, nil
}

// Close ends the connection.
func (p *PG) Close() {
	p.conn.Write([]byte{'X', 0, 0, 0, 4})
	p.conn.Close()
}

// Query runs one or more statements and returns the rows of all, as text.
// When it returns without an error, what it committed is acknowledged.
func (p *PG) Query(sql string) ([][]string, error) {
	m := append([]byte{'Q'}, binary.BigEndian.AppendUint32(nil, uint32(5+len(sql)))...)
	m = append(append(m, sql...), 0)
	if _, err := p.conn.Write(m); err != nil {
		return nil, err
	}
	return p.answer()
}

// answer reads messages until the server is ready for the next query.
func (p *PG) answer() (rows [][]string, err error) {
	for {
		var head [5]byte
		if _, e := io.ReadFull(p.in, head[:]); e != nil {
			return nil, errors.Join(err, e)
		}
		n := int(binary.BigEndian.Uint32(head[1:])) - 4
		if n < 0 || n > 64<<20 {
			return nil, fmt.Errorf("a message of %d bytes", n)
		}
		body := make([]byte, n)
		if _, e := io.ReadFull(p.in, body); e != nil {
			return nil, errors.Join(err, e)
		}
		switch head[0] {
		case 'R':
			if n < 4 || binary.BigEndian.Uint32(body) != 0 {
				return nil, errors.New("the server wants a password")
			}
		case 'D':
			row, e := parseRow(body)
			if e != nil {
				return nil, e
			}
			rows = append(rows, row)
		case 'E':
			err = errors.Join(err, fmt.Errorf("the server says: %s", strings.ReplaceAll(strings.TrimRight(string(body), "\x00"), "\x00", " ")))
		case 'Z':
			return rows, err
		}
	}
}

func parseRow(b []byte) (row []string, err error) {
	short := errors.New("a short row")
	if len(b) < 2 {
		return nil, short
	}
	k := int(binary.BigEndian.Uint16(b))
	b = b[2:]
	for range k {
		if len(b) < 4 {
			return nil, short
		}
		n := int(int32(binary.BigEndian.Uint32(b)))
		b = b[4:]
		if n < 0 { // NULL
			row = append(row, "")
			continue
		}
		if len(b) < n {
			return nil, short
		}
		row = append(row, string(b[:n]))
		b = b[n:]
	}
	return row, nil
}
