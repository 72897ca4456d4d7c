package kmsserver

import (
	"encoding/base64"
	"fmt"
	"sort"
	"strings"
	"time"
)

type keyMetadata struct {
	AWSAccountId                string
	KeyId                       string
	Arn                         string
	CreationDate                epoch
	Enabled                     bool
	Description                 string
	KeyUsage                    string
	KeyState                    string
	DeletionDate                *epoch `json:",omitempty"`
	PendingDeletionWindowInDays int    `json:",omitempty"`
	Origin                      string
	KeyManager                  string
	CustomerMasterKeySpec       string
	KeySpec                     string
	EncryptionAlgorithms        []string
	MultiRegion                 bool
	MultiRegionConfiguration    *multiRegionConfiguration `json:",omitempty"`
	CurrentKeyMaterialId        string                    `json:",omitempty"`
}

type multiRegionConfiguration struct {
	MultiRegionKeyType string
	PrimaryKey         multiRegionKey
	ReplicaKeys        []multiRegionKey
}

type multiRegionKey struct{ Arn, Region string }

func (s *Server) metadata(k *key) keyMetadata {
	m := keyMetadata{
		AWSAccountId: s.account, KeyId: k.ID, Arn: s.arn(k), CreationDate: epoch(k.Created),
		Enabled: k.state() == stateEnabled, Description: k.Description, KeyUsage: "ENCRYPT_DECRYPT",
		KeyState: k.state(), DeletionDate: maybe(k.DeletionDate), Origin: "AWS_KMS", KeyManager: "CUSTOMER",
		CustomerMasterKeySpec: encryptionAlgorithm, KeySpec: encryptionAlgorithm,
		EncryptionAlgorithms: []string{encryptionAlgorithm},
		MultiRegion:          k.multiRegion(), CurrentKeyMaterialId: k.set.current().ID,
	}
	if k.State == statePendingReplica {
		m.PendingDeletionWindowInDays = k.WindowDays
	}
	if k.state() == statePendingImport {
		m.Origin, m.CurrentKeyMaterialId = "EXTERNAL", ""
	}
	if !k.multiRegion() {
		return m
	}
	c := &multiRegionConfiguration{
		MultiRegionKeyType: "PRIMARY",
		PrimaryKey:         multiRegionKey{s.arnOf(k.Primary, k.ID), k.Primary},
		ReplicaKeys:        []multiRegionKey{},
	}
	if k.isReplica() {
		c.MultiRegionKeyType = "REPLICA"
	}
	for _, r := range s.replicas(k) {
		c.ReplicaKeys = append(c.ReplicaKeys, multiRegionKey{s.arn(r), r.Region})
	}
	sort.Slice(c.ReplicaKeys, func(i, j int) bool { return c.ReplicaKeys[i].Region < c.ReplicaKeys[j].Region })
	m.MultiRegionConfiguration = c
	return m
}

type tag struct{ TagKey, TagValue string }

func tagMap(tags []tag) (map[string]string, error) {
	out := map[string]string{}
	for _, t := range tags {
		if _, twice := out[t.TagKey]; twice || t.TagKey == "" || len(t.TagKey) > 128 || len(t.TagValue) > 256 || len(tags) > 50 {
			return nil, fail("TagException", "Invalid or duplicate tag")
		}
		out[t.TagKey] = t.TagValue
	}
	return out, nil
}

type createKeyIn struct {
	Policy                         string
	Description                    string
	KeyUsage                       string
	KeySpec                        string
	CustomerMasterKeySpec          string
	Origin                         string
	MultiRegion                    bool
	BypassPolicyLockoutSafetyCheck bool
	Tags                           []tag
}

func (in *createKeyIn) validate() error {
	if len(in.Description) > maxDescription {
		return constraint("description", fmt.Sprintf("Member must have length less than or equal to %d", maxDescription))
	}
	for given, only := range map[string]string{
		in.KeyUsage: "ENCRYPT_DECRYPT", in.KeySpec: encryptionAlgorithm,
		in.CustomerMasterKeySpec: encryptionAlgorithm, in.Origin: "AWS_KMS",
	} {
		if given != "" && given != only {
			return fail("UnsupportedOperationException", "kmsd makes %s only, not %s", only, given)
		}
	}
	return nil
}

func (s *Server) createKey(q *request, in *createKeyIn) (any, error) {
	if err := s.allowedWithoutKey(q, "CreateKey"); err != nil {
		return nil, err
	}
	if err := in.validate(); err != nil {
		return nil, err
	}
	tags, err := tagMap(in.Tags)
	if err != nil {
		return nil, err
	}
	k, err := s.newKey(q.region, in.Description, in.Policy, in.MultiRegion)
	if err != nil {
		return nil, err
	}
	k.Tags = tags
	if err := s.lockout(q, k, in.BypassPolicyLockoutSafetyCheck); err != nil {
		s.remove(keyRef{k.Region, k.ID})
		return nil, err
	}
	q.rec.KeyID = s.arn(k)
	return struct{ KeyMetadata keyMetadata }{s.metadata(k)}, nil
}

// lockout refuses a policy under which the caller cannot change it again.
func (s *Server) lockout(q *request, k *key, bypass bool) error {
	if !bypass && s.allowed(q, "PutKeyPolicy", k, "", nil) != nil {
		return fail("MalformedPolicyDocumentException", "The new key policy will not allow you to update the key policy in the future.")
	}
	return nil
}

type keyIn struct{ KeyId string }

func (s *Server) describeKey(q *request, in *keyIn) (any, error) {
	k, err := s.target(q, "DescribeKey", in.KeyId, nil)
	if err != nil {
		return nil, err
	}
	return struct{ KeyMetadata keyMetadata }{s.metadata(k)}, nil
}

// page cuts a sorted list of names: those after the marker, limit at most.
func page(names []string, limit *int, fallback int, marker string) (out []string, next string, err error) {
	n := fallback
	if limit != nil {
		if n = *limit; n < 1 || n > maxListLimit {
			return nil, "", constraint("limit", fmt.Sprintf("Member must have value between 1 and %d", maxListLimit))
		}
	}
	start := 0
	if marker != "" {
		after, err := base64.RawURLEncoding.DecodeString(marker)
		if err != nil {
			return nil, "", fail("InvalidMarkerException", "Could not parse marker")
		}
		start = sort.Search(len(names), func(i int) bool { return names[i] > string(after) })
	}
	out = names[start:]
	if len(out) > n {
		out = out[:n]
		next = base64.RawURLEncoding.EncodeToString([]byte(out[n-1]))
	}
	return out, next, nil
}

type listIn struct {
	KeyId              string
	Limit              *int
	Marker             string
	IncludeKeyMaterial string
}

func (s *Server) listKeys(q *request, in *listIn) (any, error) {
	if err := s.allowedWithoutKey(q, "ListKeys"); err != nil {
		return nil, err
	}
	var ids []string
	for ref := range s.keys {
		if ref.Region == q.region {
			ids = append(ids, ref.ID)
		}
	}
	sort.Strings(ids)
	ids, next, err := page(ids, in.Limit, 100, in.Marker)
	if err != nil {
		return nil, err
	}
	type entry struct{ KeyId, KeyArn string }
	out := struct {
		Keys       []entry
		NextMarker string `json:",omitempty"`
		Truncated  bool
	}{[]entry{}, next, next != ""}
	for _, id := range ids {
		out.Keys = append(out.Keys, entry{id, s.arnOf(q.region, id)})
	}
	return out, nil
}

func (s *Server) setState(q *request, in *keyIn, state string) (any, error) {
	k, err := s.target(q, q.op, in.KeyId, nil)
	if err != nil {
		return nil, err
	}
	if err := s.alive(k); err != nil {
		return nil, err
	}
	k.State = state
	s.dirty = true
	return nil, nil
}

func (s *Server) enableKey(q *request, in *keyIn) (any, error) {
	return s.setState(q, in, stateEnabled)
}

func (s *Server) disableKey(q *request, in *keyIn) (any, error) {
	return s.setState(q, in, stateDisabled)
}

type scheduleKeyDeletionIn struct {
	KeyId               string
	PendingWindowInDays *int
}

func (s *Server) scheduleKeyDeletion(q *request, in *scheduleKeyDeletionIn) (any, error) {
	days := defaultDeletionWindow
	if in.PendingWindowInDays != nil {
		days = *in.PendingWindowInDays
	}
	if days < 7 || days > 30 {
		return nil, constraint("pendingWindowInDays", "Member must have value between 7 and 30")
	}
	k, err := s.target(q, q.op, in.KeyId, nil)
	if err != nil {
		return nil, err
	}
	if k.State == statePending || k.State == statePendingReplica {
		return nil, s.alive(k)
	}
	k.WindowDays = days
	if !k.isReplica() && len(s.replicas(k)) > 0 {
		k.State = statePendingReplica
	} else {
		k.State, k.DeletionDate = statePending, s.now().Add(time.Duration(days)*day)
	}
	s.dirty = true
	return struct {
		KeyId               string
		DeletionDate        *epoch `json:",omitempty"`
		KeyState            string
		PendingWindowInDays int
	}{s.arn(k), maybe(k.DeletionDate), k.State, days}, nil
}

func (s *Server) cancelKeyDeletion(q *request, in *keyIn) (any, error) {
	k, err := s.target(q, q.op, in.KeyId, nil)
	if err != nil {
		return nil, err
	}
	if k.State != statePending && k.State != statePendingReplica {
		return nil, fail("KMSInvalidStateException", "%s is not pending deletion.", s.arn(k))
	}
	k.State, k.DeletionDate, k.WindowDays = stateDisabled, time.Time{}, 0
	s.dirty = true
	return keyIn{s.arn(k)}, nil
}

type replicateKeyIn struct {
	KeyId                          string
	ReplicaRegion                  string
	Policy                         string
	Description                    string
	BypassPolicyLockoutSafetyCheck bool
	Tags                           []tag
}

func (s *Server) replicateKey(q *request, in *replicateKeyIn) (any, error) {
	if !regionForm.MatchString(in.ReplicaRegion) {
		return nil, constraint("replicaRegion", "Member must satisfy regular expression pattern: ^([a-z]+-){2,3}\\d+$")
	}
	k, err := s.target(q, q.op, in.KeyId, nil)
	if err != nil {
		return nil, err
	}
	if !k.multiRegion() || k.isReplica() || in.ReplicaRegion == k.Region {
		return nil, fail("UnsupportedOperationException", "%s cannot be replicated to %s", s.arn(k), in.ReplicaRegion)
	}
	if err := s.usable(k); err != nil {
		return nil, err
	}
	ref := keyRef{in.ReplicaRegion, k.ID}
	if s.keys[ref] != nil {
		return nil, fail("AlreadyExistsException", "%s already exists", s.arnOf(ref.Region, ref.ID))
	}
	tags, err := tagMap(in.Tags)
	if err != nil {
		return nil, err
	}
	r := &key{
		ID: k.ID, Region: ref.Region, Description: in.Description, Created: s.now(),
		State: stateEnabled, Primary: k.Region, Tags: tags, set: k.set,
	}
	if err := s.setPolicy(r, in.Policy); err != nil {
		return nil, err
	}
	if err := s.lockout(q, r, in.BypassPolicyLockoutSafetyCheck); err != nil {
		return nil, err
	}
	s.keys[ref] = r
	s.dirty = true
	return struct {
		ReplicaKeyMetadata keyMetadata
		ReplicaPolicy      string
	}{s.metadata(r), r.Policy}, nil
}

func (s *Server) listResourceTags(q *request, in *listIn) (any, error) {
	k, err := s.target(q, q.op, in.KeyId, nil)
	if err != nil {
		return nil, err
	}
	out := struct {
		Tags      []tag
		Truncated bool
	}{Tags: []tag{}}
	for name, value := range k.Tags {
		out.Tags = append(out.Tags, tag{name, value})
	}
	sort.Slice(out.Tags, func(i, j int) bool { return strings.Compare(out.Tags[i].TagKey, out.Tags[j].TagKey) < 0 })
	return out, nil
}
