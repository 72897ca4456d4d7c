package pkcs11

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

const (
	scheme = "pkcs11:"
	maxURI = 1024 // bytes; far above what the attributes' own limits allow
)

// URI is a PKCS#11 URI (RFC 7512) that names a secret key: a token and an
// object in it, by label, id, or both. The zero value of a field means that
// the attribute is absent. Parse is the only way to a valid URI.
//
// The path attributes select the token and the object. The query attributes
// (module-path, module-name, pin-source) tell where things are on one machine:
// they may stand in a URI that a user types and must then agree with how the
// program was configured; a stored URI has none, because the store is not
// trusted to name code to load or files to read.
type URI struct {
	Token        string // label of the token
	Manufacturer string
	Model        string
	Serial       string
	SlotID       *uint64
	Object       string // CKA_LABEL of the key
	ID           string // CKA_ID of the key, raw bytes

	ModulePath string
	ModuleName string
	PINSource  string
}

// Limits in bytes: those of CK_TOKEN_INFO for the token's attributes, ours for
// the object's.
var limits = map[string]int{
	"token": 32, "manufacturer": 32, "model": 16, "serial": 16,
	"object": 255, "id": maxID, "module-path": 512, "module-name": 128, "pin-source": 512,
}

// pathChars and queryChars are what RFC 7512, section 2.3, allows in a value
// beside letters, digits and "%XX".
const (
	pathChars  = "-._~:[]@!$'()*+,=&"
	queryChars = "-._~:[]@!$'()*+,=/?|"
)

// Parse reads a URI. It answers keywrap.ErrBadURI for anything that is not
// RFC 7512, for attributes that select nothing here, for a URI that names no
// key, and for pin-value: a PIN in a key URI would be written into every file's
// header.
func Parse(s string) (URI, error) {
	var u URI
	rest, ok := strings.CutPrefix(s, scheme)
	if !ok || len(s) > maxURI {
		return u, bad("not a pkcs11 URI")
	}
	path, query, hasQuery := strings.Cut(rest, "?")
	seen := map[string]bool{}
	for _, attribute := range strings.Split(path, ";") {
		if err := u.parse(attribute, pathChars, seen, u.setPath); err != nil {
			return URI{}, err
		}
	}
	if hasQuery {
		for _, attribute := range strings.Split(query, "&") {
			if err := u.parse(attribute, queryChars, seen, u.setQuery); err != nil {
				return URI{}, err
			}
		}
	}
	switch {
	case u.Object == "" && u.ID == "":
		return URI{}, bad("names no object: give object= or id=")
	case u.Token == "" && u.Serial == "" && u.SlotID == nil:
		return URI{}, bad("names no token: give token=, serial= or slot-id=")
	}
	return u, nil
}

func bad(format string, args ...any) error {
	return fmt.Errorf("%w: %s", keywrap.ErrBadURI, fmt.Sprintf(format, args...))
}

// parse reads one attribute. The error never quotes a value: it may be a PIN.
func (u *URI) parse(attribute, chars string, seen map[string]bool, set func(name, value string) error) error {
	name, raw, ok := strings.Cut(attribute, "=")
	if !ok || name == "" || len(name) > 32 {
		return bad("an attribute is no NAME=VALUE")
	}
	if seen[name] {
		return bad("%q occurs twice", name)
	}
	seen[name] = true
	if name == "pin-value" {
		return bad("a key URI must not hold a PIN")
	}
	value, err := unescape(raw, chars)
	if err != nil {
		return fmt.Errorf("%w (%q)", err, name)
	}
	if value == "" {
		return bad("%q is empty", name)
	}
	if n := limits[name]; n > 0 && len(value) > n {
		return bad("%q is longer than %d bytes", name, n)
	}
	if name != "id" && !printable(value) {
		return bad("%q is not printable UTF-8", name)
	}
	return set(name, value)
}

func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) })
}

func (u *URI) setPath(name, value string) error {
	switch name {
	case "token":
		u.Token = value
	case "manufacturer":
		u.Manufacturer = value
	case "model":
		u.Model = value
	case "serial":
		u.Serial = value
	case "object":
		u.Object = value
	case "id":
		u.ID = value
	case "slot-id":
		n, err := strconv.ParseUint(value, 10, 63)
		if err != nil || strconv.FormatUint(n, 10) != value {
			return bad("slot-id is no number")
		}
		u.SlotID = &n
	case "type":
		if value != "secret-key" {
			return bad("type is not secret-key")
		}
	default:
		return bad("attribute %q is not supported", show(name))
	}
	return nil
}

func (u *URI) setQuery(name, value string) error {
	switch name {
	case "module-path":
		u.ModulePath = value
	case "module-name":
		u.ModuleName = value
	case "pin-source":
		u.PINSource = value
	default:
		return bad("query attribute %q is not supported", show(name))
	}
	return nil
}

func show(name string) string {
	if printable(name) {
		return name
	}
	return "?"
}

// unescape decodes "%XX" and refuses characters that must have been escaped.
func unescape(s, chars string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '%':
			if i+2 >= len(s) {
				return "", bad("a %% without two hexadecimal digits")
			}
			n, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
			if err != nil {
				return "", bad("a %% without two hexadecimal digits")
			}
			b.WriteByte(byte(n))
			i += 2
		case alphanumeric(c) || strings.IndexByte(chars, c) >= 0:
			b.WriteByte(c)
		default:
			return "", bad("a character that must be written as %%XX")
		}
	}
	return b.String(), nil
}

func alphanumeric(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// escape is the inverse: one spelling for every value.
func escape(s string, all bool) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; !all && (alphanumeric(c) || strings.IndexByte("-._~", c) >= 0) {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// String returns the normalized URI: the path attributes that identify the key,
// in one order and one spelling, without the query, and without the slot, whose
// number is a machine's own (see normalize). Equal URIs have equal strings.
func (u URI) String() string {
	var b strings.Builder
	b.WriteString(scheme)
	sep := ""
	add := func(name, value string, all bool) {
		if value != "" {
			b.WriteString(sep + name + "=" + escape(value, all))
			sep = ";"
		}
	}
	add("token", u.Token, false)
	add("manufacturer", u.Manufacturer, false)
	add("model", u.Model, false)
	add("serial", u.Serial, false)
	add("object", u.Object, false)
	add("id", u.ID, true)
	return b.String()
}

// normalized reports whether s, which was parsed to u, may be stored.
func (u URI) normalized(s string) bool {
	return u.SlotID == nil && u.ModulePath == "" && u.ModuleName == "" && u.PINSource == "" && u.String() == s
}

// normalize returns the URI to store for u, whose token is t: without slot and
// query, and with the token's label (its serial number if it has no label)
// where only the slot told which token is meant.
func (u URI) normalize(t tokenInfo) URI {
	u.ModulePath, u.ModuleName, u.PINSource = "", "", ""
	if u.SlotID != nil && u.Token == "" && u.Serial == "" {
		if u.Token = t.Label; u.Token == "" {
			u.Serial = t.Serial
		}
	}
	u.SlotID = nil
	return u
}

// matches reports whether the token in a slot is the one that u names.
func (u URI) matches(slot uint, t tokenInfo) bool {
	eq := func(want, got string) bool { return want == "" || want == got }
	return eq(u.Token, t.Label) && eq(u.Manufacturer, t.Manufacturer) && eq(u.Model, t.Model) && eq(u.Serial, t.Serial) &&
		(u.SlotID == nil || *u.SlotID == uint64(slot))
}

// agrees reports whether u's query names the module and the PIN file that the
// program was configured with.
func (u URI) agrees(module, pinFile string) error {
	if u.ModulePath != "" && filepath.Clean(u.ModulePath) != filepath.Clean(module) {
		return bad("module-path is not the module in use")
	}
	if u.ModuleName != "" && !slices.Contains(moduleNames(module), u.ModuleName) {
		return bad("module-name is not the module in use")
	}
	if u.PINSource != "" && (pinFile == "" || filepath.Clean(strings.TrimPrefix(u.PINSource, "file:")) != filepath.Clean(pinFile)) {
		return bad("pin-source is not the PIN file in use")
	}
	return nil
}

// moduleNames returns what RFC 7512 lets module-name be for a library: its
// name with and without "lib" and the suffix.
func moduleNames(module string) []string {
	base := filepath.Base(module)
	stem, _, _ := strings.Cut(base, ".")
	return []string{base, stem, strings.TrimPrefix(stem, "lib")}
}
