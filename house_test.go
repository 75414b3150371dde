package forerun_test

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// floors is the floor plan: a package may import only packages on lower
// floors, and its own room. The longest matching prefix counts.
var floors = map[string]int{
	"internal": 0, "block": 0, "disk": 0, "api": 0,
	"block/blocktest": 1, "disk/disktest": 1, "api/client": 1, "api/serve": 1, "lab/wan": 1, "lab/oracle": 1,
	"data": 2, "control": 2,
	"data/volume": 3, "data/replica": 3, "data/writeback": 3,
	"data/stack":     4,
	"daemon":         5,
	"daemon/backend": 6, "daemon/frontend": 6, "daemon/proxy": 6,
	"lab": 7, "cmd": 7,
	"lab/crash": 8, "lab/sim": 8, "lab/pair": 8, "lab/bench": 9,
	"cmd/forerun-lab": 10,
}

// banned are package names that say nothing about what is inside.
var banned = []string{"util", "utils", "common", "misc", "types", "helpers", "shared", "modules"}

// unordered pairs inside one floor that may know each other: a suite needs the
// language it tests, and internal mechanisms may use the language's kinds.
func mayImport(from, to string) bool {
	if room(from) == room(to) {
		return true
	}
	if strings.HasPrefix(from, "internal/") && (to == "block" || strings.HasPrefix(to, "internal/")) {
		return true
	}
	if strings.HasPrefix(from, "data/") && strings.HasPrefix(to, "control/") ||
		strings.HasPrefix(from, "control/") && strings.HasPrefix(to, "data/") {
		return false
	}
	return floor(to) < floor(from)
}

// room is the part of a package path that names its room: data/store/internal/x is data/store.
func room(p string) string {
	parts := strings.Split(p, "/")
	switch parts[0] {
	case "data", "control", "daemon", "internal", "lab":
		return strings.Join(parts[:min(2, len(parts))], "/")
	}
	return p
}

func floor(p string) int {
	for q := p; q != "."; q = path.Dir(q) {
		if f, ok := floors[q]; ok {
			return f
		}
	}
	return -1
}

type source struct {
	pkg, file string
	lines     int
	ast       *ast.File
}

func parseHouse(t *testing.T) ([]source, *token.FileSet) {
	t.Helper()
	fset := token.NewFileSet()
	var all []source
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if n := d.Name(); p != "." && (strings.HasPrefix(n, ".") || n == "bin" || n == "testdata") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") || strings.HasSuffix(p, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(fset, p, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		all = append(all, source{filepath.ToSlash(filepath.Dir(p)), p, fset.File(f.Pos()).LineCount(), f})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatal("the house is empty")
	}
	return all, fset
}

func TestFloors(t *testing.T) {
	all, _ := parseHouse(t)
	for _, s := range all {
		if floor(s.pkg) < 0 {
			t.Errorf("%s: the floor plan does not know package %s", s.file, s.pkg)
		}
		if slices.Contains(banned, path.Base(s.pkg)) {
			t.Errorf("%s: %s is a drawer, not a room: name what is in it", s.file, s.pkg)
		}
		for _, im := range s.ast.Imports {
			to, ours := strings.CutPrefix(strings.Trim(im.Path.Value, `"`), "forerun/")
			if ours && !mayImport(s.pkg, to) {
				t.Errorf("%s: %s (floor %d) imports %s (floor %d)", s.file, s.pkg, floor(s.pkg), to, floor(to))
			}
		}
	}
}

func TestPackageComments(t *testing.T) {
	all, _ := parseHouse(t)
	has := map[string]bool{}
	for _, s := range all {
		has[s.pkg] = has[s.pkg] || s.ast.Doc != nil
	}
	for p, ok := range has {
		if !ok {
			t.Errorf("package %s has no comment that tells its idea", p)
		}
	}
}

func TestExportedAreDocumented(t *testing.T) {
	all, fset := parseHouse(t)
	for _, s := range all {
		for _, d := range s.ast.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.IsExported() && d.Doc == nil && exportedReceiver(d) {
					t.Errorf("%s: %s has no doc comment", fset.Position(d.Pos()), d.Name.Name)
				}
			case *ast.GenDecl:
				for _, sp := range d.Specs {
					switch sp := sp.(type) {
					case *ast.TypeSpec:
						if sp.Name.IsExported() && d.Doc == nil && sp.Doc == nil {
							t.Errorf("%s: type %s has no doc comment", fset.Position(sp.Pos()), sp.Name.Name)
						}
					case *ast.ValueSpec:
						for _, n := range sp.Names {
							if n.IsExported() && d.Doc == nil && sp.Doc == nil && sp.Comment == nil {
								t.Errorf("%s: %s has no doc comment", fset.Position(n.Pos()), n.Name)
							}
						}
					}
				}
			}
		}
	}
}

func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	x := d.Recv.List[0].Type
	if st, ok := x.(*ast.StarExpr); ok {
		x = st.X
	}
	if ix, ok := x.(*ast.IndexExpr); ok {
		x = ix.X
	}
	id, ok := x.(*ast.Ident)
	return !ok || id.IsExported()
}

// TestStateGoesThroughTheDoor keeps the rooms that own bytes from reaching
// around package disk, where the crashing twin could not follow.
func TestStateGoesThroughTheDoor(t *testing.T) {
	rooms := []string{"data/store", "data/volume", "data/cache", "data/journal", "data/converge", "data/fill", "data/sched",
		"data/fence", "data/replica", "data/writeback", "data/failover", "data/sigs"}
	all, fset := parseHouse(t)
	for _, s := range all {
		if !slices.Contains(rooms, room(s.pkg)) {
			continue
		}
		for _, im := range s.ast.Imports {
			if p := strings.Trim(im.Path.Value, `"`); p == "golang.org/x/sys/unix" || p == "io/ioutil" {
				t.Errorf("%s: %s imports %s; files go through package disk", fset.Position(im.Pos()), s.pkg, p)
			}
		}
		ast.Inspect(s.ast, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if id, ok := sel.X.(*ast.Ident); ok && id.Name == "os" {
				switch sel.Sel.Name {
				case "Open", "OpenFile", "Create", "Rename", "Remove", "RemoveAll", "Mkdir", "MkdirAll", "ReadFile", "WriteFile", "ReadDir", "Truncate":
					t.Errorf("%s: os.%s; files go through package disk", fset.Position(n.Pos()), sel.Sel.Name)
				}
			}
			return true
		})
	}
}

// TestModulesAreJustified asks for a word in ARCHITECTURE.md on each module
// that go.mod requires directly.
func TestModulesAreJustified(t *testing.T) {
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	arch, err := os.ReadFile("ARCHITECTURE.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range strings.Split(string(mod), "\n") {
		f := strings.Fields(strings.TrimPrefix(strings.TrimSpace(l), "require "))
		if len(f) < 2 || !strings.HasPrefix(f[1], "v") || strings.Contains(l, "// indirect") {
			continue
		}
		if !strings.Contains(string(arch), f[0]) {
			t.Errorf("go.mod requires %s; ARCHITECTURE.md does not say why", f[0])
		}
	}
}

// TestSizes judges nothing: it shows where the house is growing.
func TestSizes(t *testing.T) {
	type sized struct {
		name string
		n    int
	}
	all, fset := parseHouse(t)
	var files, funcs, structs []sized
	for _, s := range all {
		files = append(files, sized{s.file, s.lines})
		methods := map[string]int{}
		for _, d := range s.ast.Decls {
			if f, ok := d.(*ast.FuncDecl); ok {
				n := fset.Position(f.End()).Line - fset.Position(f.Pos()).Line + 1
				funcs = append(funcs, sized{s.file + " " + f.Name.Name, n})
				if f.Recv != nil {
					methods[fmt.Sprint(f.Recv.List[0].Type)]++
				}
			}
			if g, ok := d.(*ast.GenDecl); ok {
				for _, sp := range g.Specs {
					if ts, ok := sp.(*ast.TypeSpec); ok {
						n := fset.Position(ts.End()).Line - fset.Position(ts.Pos()).Line + 1
						structs = append(structs, sized{s.file + " " + ts.Name.Name, n})
					}
				}
			}
		}
	}
	for _, l := range []struct {
		what string
		s    []sized
	}{{"files", files}, {"functions", funcs}, {"types", structs}} {
		slices.SortFunc(l.s, func(a, b sized) int { return cmp.Compare(b.n, a.n) })
		t.Logf("ten largest %s (lines):", l.what)
		for _, s := range l.s[:min(10, len(l.s))] {
			t.Logf("%6d %s", s.n, s.name)
		}
	}
}
