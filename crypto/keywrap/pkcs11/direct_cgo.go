//go:build pkcs11 && cgo

package pkcs11

/*
#include <stddef.h>

typedef unsigned long ck_ulong;
typedef struct { ck_ulong type; void *value; ck_ulong len; } ck_attribute;

// The head of CK_FUNCTION_LIST (PKCS#11 2.40, pkcs11f.h): the version, then
// pointers in the standard's order, of which these are the places used here.
typedef struct { unsigned char major, minor; void *call[67]; } function_list;
enum { C_LOGIN = 18, C_CREATE_OBJECT = 20, C_GET_ATTRIBUTE_VALUE = 24, C_DECRYPT = 34, C_GENERATE_RANDOM = 64 };

// What miekg/pkcs11 keeps for a module.
typedef struct { void *handle; function_list *list; } loaded_module;

static function_list *list_of(void *ctx) { return ((loaded_module *)ctx)->list; }

static ck_ulong direct_login(function_list *l, ck_ulong s, void *pin, ck_ulong n) {
	return ((ck_ulong (*)(ck_ulong, ck_ulong, void *, ck_ulong))l->call[C_LOGIN])(s, 1, pin, n); // CKU_USER
}

static ck_ulong direct_random(function_list *l, ck_ulong s, void *out, ck_ulong n) {
	return ((ck_ulong (*)(ck_ulong, void *, ck_ulong))l->call[C_GENERATE_RANDOM])(s, out, n);
}

static ck_ulong direct_decrypt(function_list *l, ck_ulong s, void *in, ck_ulong n, void *out, ck_ulong *len) {
	return ((ck_ulong (*)(ck_ulong, void *, ck_ulong, void *, ck_ulong *))l->call[C_DECRYPT])(s, in, n, out, len);
}

// A private generic secret (CKO_SECRET_KEY, CKK_GENERIC_SECRET) of this session.
static ck_ulong direct_create(function_list *l, ck_ulong s, void *value, ck_ulong n, ck_ulong *object) {
	ck_ulong class = 4, type = 0x10;
	unsigned char yes = 1, no = 0;
	ck_attribute t[] = {
		{0x000, &class, sizeof class},  // CKA_CLASS
		{0x100, &type, sizeof type},    // CKA_KEY_TYPE
		{0x001, &no, 1},                // CKA_TOKEN
		{0x002, &yes, 1},               // CKA_PRIVATE
		{0x162, &yes, 1},               // CKA_EXTRACTABLE: it is there to be wrapped
		{0x011, value, n},              // CKA_VALUE
	};
	return ((ck_ulong (*)(ck_ulong, ck_attribute *, ck_ulong, ck_ulong *))l->call[C_CREATE_OBJECT])(s, t, sizeof t / sizeof *t, object);
}

static ck_ulong direct_value(function_list *l, ck_ulong s, ck_ulong object, void *out, ck_ulong *len) {
	ck_attribute t = {0x011, out, *len}; // CKA_VALUE
	ck_ulong r = ((ck_ulong (*)(ck_ulong, ck_ulong, ck_attribute *, ck_ulong))l->call[C_GET_ATTRIBUTE_VALUE])(s, object, &t, 1);
	*len = t.len;
	return r;
}
*/
import "C"

import (
	"unsafe"

	p11 "github.com/miekg/pkcs11"
)

// direct calls the functions of a module that take or give a secret, on buffers
// of the caller. The wrapper library copies such values to the C heap and frees
// them there unwiped.
type direct struct{ list *C.function_list }

// directOf takes the function list of a loaded module from miekg/pkcs11, whose
// Ctx is a pointer to {handle, list} (v1.1.2; TestModuleDirect would fail with
// another). Asking the module again might give another instance (p11-kit's
// proxy does that), with other sessions.
func directOf(ctx *p11.Ctx) direct {
	return direct{C.list_of(*(*unsafe.Pointer)(unsafe.Pointer(ctx)))}
}

func result(r C.ck_ulong) error {
	if r == 0 {
		return nil
	}
	return rv(r)
}

// start returns the address of b's bytes; nil for none.
func start(b []byte) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(b)) }

func (d direct) login(s session, pin []byte) error {
	return result(C.direct_login(d.list, C.ck_ulong(s), start(pin), C.ck_ulong(len(pin))))
}

func (d direct) random(s session, out []byte) error {
	return result(C.direct_random(d.list, C.ck_ulong(s), start(out), C.ck_ulong(len(out))))
}

func (d direct) decrypt(s session, in, out []byte) (int, error) {
	n := C.ck_ulong(len(out))
	err := result(C.direct_decrypt(d.list, C.ck_ulong(s), start(in), C.ck_ulong(len(in)), start(out), &n))
	return written(n, out, err)
}

func (d direct) create(s session, value []byte) (object, error) {
	var o C.ck_ulong
	// The template that holds this pointer is on the C stack.
	err := result(C.direct_create(d.list, C.ck_ulong(s), start(value), C.ck_ulong(len(value)), &o))
	return object(o), err
}

func (d direct) value(s session, o object, out []byte) (int, error) {
	n := C.ck_ulong(len(out))
	err := result(C.direct_value(d.list, C.ck_ulong(s), C.ck_ulong(o), start(out), &n))
	return written(n, out, err)
}

// written checks a length that the module gives.
func written(n C.ck_ulong, out []byte, err error) (int, error) {
	if err != nil {
		return 0, err
	}
	if n > C.ck_ulong(len(out)) {
		return 0, rvGeneralError
	}
	return int(n), nil
}

// number reads a CK_ULONG; 0 if it is none.
func number(b []byte) uint {
	if len(b) != int(unsafe.Sizeof(C.ck_ulong(0))) {
		return 0
	}
	return uint(*(*C.ck_ulong)(start(b)))
}
