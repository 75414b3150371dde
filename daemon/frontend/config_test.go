package frontend

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func valid() Config {
	return Config{PKI: "pki", Name: "n", StateDir: "s", Backend: "one:1", Volumes: []string{"a", "b", "c", "d"},
		Backends: map[string]string{"c": "two:2", "d": "two:2"}, Exports: []string{"nbd://localhost"}}
}

func TestParseVolume(t *testing.T) {
	for in, want := range map[string][2]string{
		"web": {"web", ""}, "web=old.example:7410": {"web", "old.example:7410"}, "web=[::1]:7410": {"web", "[::1]:7410"},
	} {
		if n, b, err := ParseVolume(in); err != nil || n != want[0] || b != want[1] {
			t.Errorf("%q: %q %q %v", in, n, b, err)
		}
	}
	for _, in := range []string{"web=", "web=host", "web=:7410", "web=host:", "=host:1", "web=/srv/web.raw"} {
		if n, b, err := ParseVolume(in); err == nil || !strings.Contains(err.Error(), "NAME=HOST:PORT") {
			t.Errorf("%q: %q %q %v", in, n, b, err)
		}
	}
}

// TestGroupsOfTwoBackends: a checkpoint is one transaction at one backend.
func TestGroupsOfTwoBackends(t *testing.T) {
	show := func(c Config) string {
		var out []string
		for _, g := range c.groups() {
			out = append(out, fmt.Sprint(g.name, g.volumes, c.backendOf(g.volumes[0])))
		}
		slices.Sort(out)
		return strings.Join(out, " ")
	}
	c := valid()
	if got := show(c); got != "a+b[a b]one:1 c+d[c d]two:2" {
		t.Error(got)
	}
	c.Groups = map[string][]string{"db": {"c"}, "log": {"b", "a"}}
	if got := show(c); got != "d[d]two:2 db[c]two:2 log[b a]one:1" {
		t.Error(got)
	}
	if err := c.check(); err != nil {
		t.Error(err)
	}
}

func TestCheckBackendsAndGroups(t *testing.T) {
	for _, c := range []struct {
		name  string
		alter func(*Config)
		want  string // in the error, empty for none
	}{
		{"two backends", func(*Config) {}, ""},
		{"no default that would be needed", func(c *Config) { c.Backend = "" }, "--volume a=HOST:PORT"},
		{"no default, and none is needed", func(c *Config) { c.Backend, c.Volumes = "", []string{"c", "d"} }, ""},
		{"no port", func(c *Config) { c.Backend = "one" }, "--backend"},
		{"a group across", func(c *Config) { c.Groups = map[string][]string{"db": {"a", "c"}} }, "one transaction at one backend"},
		{"a group of a backend", func(c *Config) { c.Groups = map[string][]string{"db": {"d", "c"}} }, ""},
		{"a group with the name of the others", func(c *Config) { c.Groups = map[string][]string{"b": {"a"}} }, "choose another"},
		{"a group with the name of others elsewhere", func(c *Config) { c.Groups = map[string][]string{"c+d": {"a"}} }, ""},
	} {
		cfg := valid()
		c.alter(&cfg)
		switch err := cfg.check(); {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestLinks: volumes of one backend share its link, and no others.
func TestLinks(t *testing.T) {
	c := valid()
	c.Volumes = []string{"c", "a", "d", "b"}
	f := &Frontend{cfg: c, links: newLinks(&c)}
	if got := strings.Join(f.addresses(), " "); got != "two:2 one:1" {
		t.Error(got)
	}
	if f.link("c") != f.link("d") || f.link("a") != f.link("b") || f.link("a") == f.link("c") {
		t.Errorf("%+v %+v", f.links[0], f.links[1])
	}
	f.over = map[string]string{"c": "aborted"}
	if !f.needs(f.link("c")) {
		t.Error("d is left, and the backend is not needed")
	}
	f.over["d"] = "aborted"
	if f.needs(f.link("c")) || !f.needs(f.link("a")) {
		t.Error("one backend is needed, and it is the other one")
	}
}
