// Package keywraptest is the contract suite of keywrap.Provider.
//
// Every implementation runs it from its own tests. What a test server cannot
// show (an emulator that does not enforce key states, say) is named in
// Setup.NotCovered with the reason; nothing is left out in silence.
package keywraptest
