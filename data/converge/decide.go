package converge

// verdict is what comes after a round.
type verdict uint8

const (
	another verdict = iota // copy the changeset
	cut                    // it is small enough: close the gate
	giveUp                 // it does not get smaller: ask the operator
)

// patience is how many rounds in a row may end without a new smallest
// changeset.
const patience = 3

// decide is the loop of the copier as a function. sizes are the changesets at
// the beginning of each finished round, now is what is to be copied next, all
// in bytes.
func decide(sizes []int64, now, threshold int64, maxRounds int) verdict {
	if now <= threshold && len(sizes) > 0 {
		return cut
	}
	if len(sizes) >= maxRounds {
		return giveUp
	}
	if n := len(sizes); n >= patience {
		best := sizes[0]
		for _, s := range sizes[1 : n-patience+1] {
			best = min(best, s)
		}
		shrunk := now < best
		for _, s := range sizes[n-patience+1:] {
			shrunk = shrunk || s < best
		}
		if !shrunk {
			return giveUp
		}
	}
	return another
}
