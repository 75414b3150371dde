package wire

import "testing"

func TestDSCP(t *testing.T) {
	for s, want := range map[string][3]int{
		DefaultDSCP:             {26, 18, 8},
		"none":                  {0, 0, 0},
		"background=LE":         {5, 6, 1},
		"demand=EF,writeback=0": {46, 0, 7},
		"demand=63":             {63, 6, 7},
		"demand=cs6":            {48, 6, 7},
		"demand=64":             {-1},
		"demand=AF44":           {-1},
		"demand=AF03":           {-1},
		"demand=CS8":            {-1},
		"demand=-1":             {-1},
		"fill=EF":               {-1},
		"demand":                {-1},
		"":                      {-1},
	} {
		o := SocketOptions{DemandDSCP: 5, WriteBackDSCP: 6, BackgroundDSCP: 7}
		err := o.SetDSCP(s)
		if (want[0] < 0) != (err != nil) {
			t.Errorf("%q: %v", s, err)
		} else if got := [3]int{o.DemandDSCP, o.WriteBackDSCP, o.BackgroundDSCP}; err == nil && got != want {
			t.Errorf("%q: %v, want %v", s, got, want)
		}
	}
}
