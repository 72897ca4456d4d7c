package record

// Names of what a store keeps for itself beside its files.
const (
	MetaDir      = ".kmsfs"       // in the root
	StoreFile    = "store"        // in MetaDir
	StoreCopy    = ".kmsfs.store" // in the root: the second copy of StoreFile
	ClassesDir   = "classes"      // in MetaDir; a file for each class
	LockFile     = "lock"         // in MetaDir
	RewrapFile   = "rewrap"       // in MetaDir: the batch of headers being rewritten
	KeysUsedFile = "keys-used"    // in MetaDir: when each key was last used
	LongEntry    = ".kmsfs.l."    // begins the only entries of the plaintext tree with the prefix ".kmsfs"
)
