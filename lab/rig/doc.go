// Package rig runs the product as its users do: the forerun binary, its
// certificates, a backend and a frontend as processes, in network namespaces
// or not, steered through its command line and watched through its API.
//
// Invariants: a process started here is waited for, is killed by its own id
// only, and dies with this process. Its output is kept in a file beside its
// state; an error about it shows the end of that file.
package rig
