// Package stack is the only room that knows the others: it puts a frontend's
// volume together, storey by storey, and starts what runs beside it.
//
// Top to bottom (ARCHITECTURE.md draws it): converge.Switch, patience, journal,
// converge.Tracker, volume; beside the volume its cache and the site's store;
// below it the scheduler over the link. A Checked stands between each two that
// may be wrong about one another. Fill feeds the volume; it sees what the
// guest sees because it asks the same volume.
//
// A volume directory holds volume.json (what the source said when the volume
// was first opened, so that a restart needs no backend), map/, journal/ and
// cutover/. A volume whose plan says switched is its native target and nothing
// else: no map is read and no link is made.
//
// Order of closing: fill, cut-over, journal, volume, cache; the store is the
// caller's. Nothing here holds a lock while it calls a storey.
package stack
