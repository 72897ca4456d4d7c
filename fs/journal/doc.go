// Package journal keeps the redo journal of a store.
package journal
