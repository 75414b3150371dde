//go:build race

package sigs

// racing: the detector makes everything many times slower.
const racing = true
