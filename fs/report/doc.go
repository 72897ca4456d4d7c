// Package report renders what an auditor asks about a store's keys as one HTML
// page that needs nothing else: no script, no font, no image, no address from
// which it would load anything. The page follows the reader's light or dark
// preference, prints, and draws its one chart as inline SVG with a table of the
// same numbers beside it.
//
// Data is all that the page shows; the caller fills it from the key services,
// the inventory of the store and, through a Collector, the audit log. Plaintext
// names of files have no place in it. Every text is escaped.
package report
