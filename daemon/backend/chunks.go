package backend

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// SetChunks reads how chunks are cut: sizes are BYTES or NAME=BYTES, cuts are
// fixed or content, or NAME= and one of them. Without a name it is for all
// volumes that are not named. c.Volumes must be set.
func (c *Config) SetChunks(sizes, cuts []string) error {
	for _, s := range sizes {
		v, value, err := c.about("--chunk", s)
		if err != nil {
			return err
		}
		n, err := strconv.Atoi(value)
		if err != nil || n <= 0 {
			return fmt.Errorf("--chunk %q is not BYTES or NAME=BYTES; example: web=262144", s)
		}
		if v == nil {
			c.ChunkBytes = n
		} else {
			v.ChunkBytes = n
		}
	}
	for _, s := range cuts {
		v, value, err := c.about("--chunking", s)
		if err != nil {
			return err
		}
		if value != "fixed" && value != "content" {
			return fmt.Errorf("--chunking %q is not fixed or content, or NAME= and one of them; example: web=content", s)
		}
		content := value == "content"
		if v == nil {
			c.Content = content
		} else {
			v.Content = &content
		}
	}
	return nil
}

// about takes [NAME=]VALUE apart; v is nil without a name.
func (c *Config) about(flag, s string) (v *Volume, value string, err error) {
	i := strings.LastIndex(s, "=")
	if i < 0 {
		return nil, s, nil
	}
	at := slices.IndexFunc(c.Volumes, func(v Volume) bool { return v.Name == s[:i] })
	if at < 0 {
		return nil, "", fmt.Errorf("%s %s: there is no volume %q; say --volume %s=SOURCE too", flag, s, s[:i], s[:i])
	}
	return &c.Volumes[at], s[i+1:], nil
}
