package kmsserver

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/kmsfs/kmsfs/integration/kmsd/iampolicy"
)

// The states of a key, as DescribeKey spells them.
const (
	stateEnabled          = "Enabled"
	stateDisabled         = "Disabled"
	statePending          = "PendingDeletion"
	statePendingReplica   = "PendingReplicaDeletion"
	statePendingImport    = "PendingImport"
	maxOnDemandRotations  = 25 // per key (KMS Developer Guide, "Resource quotas")
	rotationDefaultDays   = 365
	rotationOnDemand      = "ON_DEMAND"
	rotationAutomatic     = "AUTOMATIC"
	day                   = 24 * time.Hour
	encryptionAlgorithm   = "SYMMETRIC_DEFAULT"
	defaultPolicyName     = "default"
	maxKeyRef             = 2048
	maxDescription        = 8192
	defaultDeletionWindow = 30
)

// material is one version of a key.
type material struct {
	ID      string    `json:"id"` // 64 hexadecimal digits
	Bytes   []byte    `json:"bytes"`
	Created time.Time `json:"created"`
	Type    string    `json:"type,omitempty"` // "" for the first
}

// materialSet is what all Regions of a key have in common.
type materialSet struct {
	Versions   []material `json:"versions"` // the last is current
	Rotation   bool       `json:"rotation"`
	PeriodDays int        `json:"period_days,omitempty"`
	EnabledAt  time.Time  `json:"enabled_at"`
	OnDemand   int        `json:"on_demand"`
}

func (m *materialSet) current() *material { return &m.Versions[len(m.Versions)-1] }

func (m *materialSet) add(kind string, at time.Time) {
	b := make([]byte, 32)
	rand.Read(b)
	sum := sha256.Sum256(append([]byte("kmsd key-material id\x00"), b...))
	m.Versions = append(m.Versions, material{ID: hex.EncodeToString(sum[:]), Bytes: b, Created: at, Type: kind})
}

// next returns when the next automatic rotation is due.
func (m *materialSet) next() time.Time {
	from := m.EnabledAt
	for _, v := range m.Versions {
		if v.Type == rotationAutomatic && v.Created.After(from) {
			from = v.Created
		}
	}
	return from.Add(time.Duration(m.PeriodDays) * day)
}

// key is one key in one Region.
type key struct {
	ID              string            `json:"id"`
	Region          string            `json:"region"`
	Description     string            `json:"description,omitempty"`
	Policy          string            `json:"policy"`
	Created         time.Time         `json:"created"`
	State           string            `json:"state"`
	MaterialExpired bool              `json:"material_expired,omitempty"`
	DeletionDate    time.Time         `json:"deletion_date"`
	WindowDays      int               `json:"window_days,omitempty"`
	Primary         string            `json:"primary,omitempty"` // Region of the primary; "" for single-Region keys
	Tags            map[string]string `json:"tags,omitempty"`

	set    *materialSet
	policy *iampolicy.Document
}

type keyRef struct{ Region, ID string }

type aliasRef struct{ Region, Name string }

type alias struct {
	KeyID   string    `json:"key_id"`
	Created time.Time `json:"created"`
	Updated time.Time `json:"updated"`
}

func (k *key) multiRegion() bool { return k.Primary != "" }
func (k *key) isReplica() bool   { return k.Primary != "" && k.Primary != k.Region }

// state is what DescribeKey reports.
func (k *key) state() string {
	if k.MaterialExpired && (k.State == stateEnabled || k.State == stateDisabled) {
		return statePendingImport
	}
	return k.State
}

func (s *Server) arnOf(region, id string) string {
	return "arn:aws:kms:" + region + ":" + s.account + ":key/" + id
}

func (s *Server) arn(k *key) string { return s.arnOf(k.Region, k.ID) }

func (s *Server) aliasARN(r aliasRef) string {
	return "arn:aws:kms:" + r.Region + ":" + s.account + ":" + r.Name
}

// arnRegion returns the Region of an ARN, "" if ref is none.
func arnRegion(ref string) string {
	parts := strings.SplitN(ref, ":", 6)
	if len(parts) != 6 || parts[0] != "arn" {
		return ""
	}
	return parts[3]
}

// find resolves a key id, key ARN, alias name or alias ARN in a Region.
func (s *Server) find(region, ref string) (*key, error) {
	if ref == "" || len(ref) > maxKeyRef {
		return nil, constraint("keyId", fmt.Sprintf("Member must have length between 1 and %d", maxKeyRef))
	}
	name := ref
	if strings.HasPrefix(ref, "arn:") {
		parts := strings.SplitN(ref, ":", 6)
		if len(parts) != 6 || parts[2] != "kms" {
			return nil, fail("InvalidArnException", "Invalid arn %s", ref)
		}
		if parts[3] != region {
			return nil, fail("NotFoundException", "Invalid arn %s", parts[3])
		}
		if parts[4] != s.account {
			return nil, fail("NotFoundException", "Key '%s' does not exist", ref)
		}
		name = parts[5]
		if id, ok := strings.CutPrefix(name, "key/"); ok {
			name = id
		} else if !strings.HasPrefix(name, "alias/") {
			return nil, fail("InvalidArnException", "Invalid arn %s", ref)
		}
	}
	if strings.HasPrefix(name, "alias/") {
		a := s.aliases[aliasRef{region, name}]
		if a == nil {
			return nil, fail("NotFoundException", "Alias %s is not found.", s.aliasARN(aliasRef{region, name}))
		}
		name = a.KeyID
	}
	if k := s.keys[keyRef{region, name}]; k != nil {
		return k, nil
	}
	if !keyIDForm.MatchString(name) {
		return nil, fail("NotFoundException", "Invalid keyId '%s'", ref)
	}
	return nil, fail("NotFoundException", "Key '%s' does not exist", s.arnOf(region, name))
}

// usable answers nil for a key that cryptographic operations may use.
func (s *Server) usable(k *key) error {
	switch k.state() {
	case stateEnabled:
		return nil
	case stateDisabled:
		return fail("DisabledException", "%s is disabled.", s.arn(k))
	}
	return s.alive(k)
}

// alive answers nil for a key that management operations may change.
func (s *Server) alive(k *key) error {
	switch k.state() {
	case statePending:
		return fail("KMSInvalidStateException", "%s is pending deletion.", s.arn(k))
	case statePendingReplica:
		return fail("KMSInvalidStateException", "%s is pending replica deletion.", s.arn(k))
	case statePendingImport:
		return fail("KMSInvalidStateException", "%s is pending import.", s.arn(k))
	}
	return nil
}

// newKey makes an enabled key; an empty policy is the default one.
func (s *Server) newKey(region, description, policy string, multiRegion bool) (*key, error) {
	now := s.now()
	k := &key{
		ID: newUUID(), Region: region, Description: description, Policy: policy,
		Created: now, State: stateEnabled, set: &materialSet{},
	}
	if multiRegion {
		k.ID, k.Primary = "mrk-"+strings.ReplaceAll(newUUID(), "-", ""), region
	}
	if err := s.setPolicy(k, policy); err != nil {
		return nil, err
	}
	k.set.add("", now)
	s.keys[keyRef{region, k.ID}] = k
	s.sets[k.ID] = k.set
	s.dirty = true
	return k, nil
}

func (s *Server) setPolicy(k *key, policy string) error {
	if policy == "" {
		policy = fmt.Sprintf(defaultPolicy, s.account)
	}
	doc, err := iampolicy.Parse([]byte(policy))
	if err != nil {
		return fail("MalformedPolicyDocumentException", "%v", err)
	}
	k.Policy, k.policy = policy, doc
	return nil
}

const defaultPolicy = `{
  "Version" : "2012-10-17",
  "Id" : "key-default-1",
  "Statement" : [ {
    "Sid" : "Enable IAM User Permissions",
    "Effect" : "Allow",
    "Principal" : {
      "AWS" : "arn:aws:iam::%s:root"
    },
    "Action" : "kms:*",
    "Resource" : "*"
  } ]
}`

// tick does what time has made due: deletions and rotations.
func (s *Server) tick() {
	now := s.now()
	for ref, k := range s.keys {
		if k.State == statePendingReplica && len(s.replicas(k)) == 0 {
			k.State, k.DeletionDate = statePending, now.Add(time.Duration(k.WindowDays)*day)
			s.dirty = true
		}
		if k.State == statePending && !now.Before(k.DeletionDate) {
			s.remove(ref)
		}
	}
	for id, set := range s.sets {
		for set.Rotation && s.rotates(id) {
			due := set.next()
			if now.Before(due) {
				break
			}
			set.add(rotationAutomatic, due)
			s.dirty = true
		}
	}
}

// rotates tells whether the key's primary is in a state that rotates: AWS does
// not rotate keys that are disabled or pending deletion.
func (s *Server) rotates(id string) bool {
	for ref, k := range s.keys {
		if ref.ID == id && !k.isReplica() {
			return k.state() == stateEnabled
		}
	}
	return false
}

func (s *Server) replicas(k *key) []*key {
	var out []*key
	for ref, other := range s.keys {
		if ref.ID == k.ID && other.isReplica() {
			out = append(out, other)
		}
	}
	return out
}

func (s *Server) remove(ref keyRef) {
	delete(s.keys, ref)
	for a, target := range s.aliases {
		if a.Region == ref.Region && target.KeyID == ref.ID {
			delete(s.aliases, a)
		}
	}
	left := false
	for other := range s.keys {
		left = left || other.ID == ref.ID
	}
	if !left {
		delete(s.sets, ref.ID)
	}
	s.dirty = true
}

// newUUID returns a random UUID, version 4 (RFC 9562).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}
