package daemon

import (
	"maps"
	"testing"

	"forerun/block"
)

func TestSources(t *testing.T) {
	states := map[string]string{"a": "gone", "b": "", "other's": "gone too"}
	p, err := AnswerSources(AskSources([]string{"a", "b", "unknown"}), func(v string) string { return states[v] })
	if err != nil {
		t.Fatal(err)
	}
	if away, err := ReadSources(p); err != nil || !maps.Equal(away, map[string]string{"a": "gone"}) {
		t.Errorf("%v %v", away, err)
	}
	if _, err := AnswerSources([]byte("{"), func(string) string { return "" }); block.KindOf(err) != block.KindInvalid {
		t.Error(err)
	}
	if _, err := ReadSources([]byte("[]")); block.KindOf(err) != block.KindInvalid {
		t.Error(err)
	}
}
