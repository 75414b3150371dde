package sched

import (
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"

	"forerun/block"
)

const bg = block.Background

func TestQueueOrder(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(q *Queue)
		want [][]int64 // batches of at most 4 until nothing is left, by rank
	}{
		{"runs ride together", func(q *Queue) {
			for _, i := range []int64{5, 6, 7, 8, 9, 20} {
				q.Add(i, bg)
			}
		}, [][]int64{{5, 6, 7, 8}, {9}, {20}}},
		{"demand before read-ahead before the sweep", func(q *Queue) {
			q.Add(1, bg)
			q.Add(9, bg|block.Soon)
			q.Add(4, block.WriteBack)
			q.Add(7, block.Demand)
		}, [][]int64{{7}, {4}, {9}, {1}}},
		{"raised goes first and only once", func(q *Queue) {
			for i := int64(1); i <= 3; i++ {
				q.Add(i, bg)
			}
			if a := q.Add(2, block.Demand); a != Raised {
				panic(a)
			}
			if a := q.Add(2, bg); a != Joined {
				panic(a)
			}
		}, [][]int64{{2}, {1}, {3}}},
		{"dropped is gone", func(q *Queue) {
			q.Add(1, bg)
			q.Add(2, bg)
			q.Done(1)
		}, [][]int64{{2}}},
	} {
		q := NewQueue()
		c.do(q)
		if got := drain(q); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func drain(q *Queue) (out [][]int64) {
	for r := rankDemand; r < ranks; r++ {
		for b := q.Next(r, 4); b != nil; b = q.Next(r, 4) {
			out = append(out, b)
		}
	}
	return out
}

func TestQueuePromotesWhatIsOnItsWay(t *testing.T) {
	q := NewQueue()
	q.Add(3, bg)
	q.Next(rankSweep, 1)
	if !q.Sent(3) || q.sent[rankSweep] != 1 {
		t.Fatal("chunk 3 was not sent")
	}
	if a := q.Add(3, block.Demand); a != Promote || q.sent[rankDemand] != 1 || q.sent[rankSweep] != 0 {
		t.Fatalf("%v, %v", a, q.sent)
	}
	if a := q.Add(3, block.Demand); a != Joined {
		t.Fatal(a)
	}
	q.Done(3)
	if a := q.Add(3, bg); a != Fresh {
		t.Fatal(a)
	}
}

// simple is the queue's twin: a list searched from the front.
type simple struct{ items []simpleItem }

type simpleItem struct {
	idx  int64
	rank rank
	sent bool
	seq  int
}

func (s *simple) add(idx int64, f block.Flags, seq int) Added {
	r := rankOf(f)
	for i := range s.items {
		it := &s.items[i]
		if it.idx != idx {
			continue
		}
		switch {
		case it.rank <= r:
			return Joined
		case it.sent:
			it.rank = r
			return Promote
		}
		it.rank, it.seq = r, seq
		return Raised
	}
	s.items = append(s.items, simpleItem{idx, r, false, seq})
	return Fresh
}

func (s *simple) next(r rank, most int) (batch []int64) {
	oldest := -1
	for i, it := range s.items {
		if it.rank == r && !it.sent && (oldest < 0 || it.seq < s.items[oldest].seq) {
			oldest = i
		}
	}
	if oldest < 0 {
		return nil
	}
	idx := s.items[oldest].idx
	for len(batch) < most {
		i := slices.IndexFunc(s.items, func(it simpleItem) bool { return it.idx == idx && it.rank == r && !it.sent })
		if i < 0 {
			break
		}
		s.items[i].sent = true
		batch = append(batch, idx)
		idx++
	}
	return batch
}

func (s *simple) done(idx int64) {
	s.items = slices.DeleteFunc(s.items, func(it simpleItem) bool { return it.idx == idx })
}

func TestQueueAgainstItsTwin(t *testing.T) {
	classes := []block.Flags{block.Demand, block.WriteBack, bg | block.Soon, bg}
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		q, tw := NewQueue(), &simple{}
		for step := range 400 {
			idx := int64(r.IntN(40))
			switch r.IntN(5) {
			case 0, 1, 2:
				f := classes[r.IntN(len(classes))]
				if a, b := q.Add(idx, f), tw.add(idx, f, step); a != b {
					t.Fatalf("seed %d step %d: add %d %v: %d, twin %d", seed, step, idx, f, a, b)
				}
			case 3:
				rk, most := rank(r.IntN(int(ranks))), 1+r.IntN(5)
				if a, b := q.Next(rk, most), tw.next(rk, most); !slices.Equal(a, b) {
					t.Fatalf("seed %d step %d: next %d: %v, twin %v", seed, step, rk, a, b)
				}
			case 4:
				q.Done(idx)
				tw.done(idx)
			}
			var queued, sent [ranks]int
			for _, it := range tw.items {
				if it.sent {
					sent[it.rank]++
				} else {
					queued[it.rank]++
				}
			}
			if queued != q.queued || sent != q.sent {
				t.Fatalf("seed %d step %d: %v %v, twin %v %v", seed, step, q.queued, q.sent, queued, sent)
			}
		}
	}
}
