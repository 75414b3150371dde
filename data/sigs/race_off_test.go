//go:build !race

package sigs

const racing = false
