// Package bench holds the scenarios in which the product must prove itself
// against its peers: a whole migration of a running guest, boots over a slow
// line, copies over it, how the link between its ends is used, and local input
// and output.
//
// All ratios come from one run on one machine. Every scenario fills a Report;
// a failed expectation does not stop it, an impossible next step does.
//
// Invariant: what a scenario starts it ends, also when it fails: guests,
// daemons, servers, namespaces, and files unless Options.Keep is set.
package bench
