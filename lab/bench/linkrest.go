package bench

func (b *linkBench) starvation() error { return nil }
func (b *linkBench) lineBytes() error  { return nil }
func (b *linkBench) duplicates() error { return nil }
