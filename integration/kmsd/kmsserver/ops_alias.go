package kmsserver

import (
	"sort"
	"strings"
)

type aliasIn struct {
	AliasName   string
	TargetKeyId string
}

// aliasTarget resolves the key that an alias is to name.
func (s *Server) aliasTarget(q *request, in *aliasIn) (*key, error) {
	if err := checkAliasName(in.AliasName); err != nil {
		return nil, err
	}
	if strings.Contains(in.TargetKeyId, "alias/") {
		return nil, invalid("Aliases must refer to keys. Not aliases")
	}
	k, err := s.target(q, q.op, in.TargetKeyId, nil)
	if err != nil {
		return nil, err
	}
	return k, s.alive(k)
}

func (s *Server) createAlias(q *request, in *aliasIn) (any, error) {
	k, err := s.aliasTarget(q, in)
	if err != nil {
		return nil, err
	}
	ref := aliasRef{q.region, in.AliasName}
	if s.aliases[ref] != nil {
		return nil, fail("AlreadyExistsException", "An alias with the name %s already exists", s.aliasARN(ref))
	}
	now := s.now()
	s.aliases[ref] = &alias{KeyID: k.ID, Created: now, Updated: now}
	s.dirty = true
	return nil, nil
}

// permitAlias checks permission on the key that an alias names now.
func (s *Server) permitAlias(q *request, ref aliasRef) (*alias, error) {
	a := s.aliases[ref]
	if a == nil {
		return nil, fail("NotFoundException", "Alias %s is not found.", s.aliasARN(ref))
	}
	return a, s.allowed(q, q.op, s.keys[keyRef{ref.Region, a.KeyID}], "", nil)
}

func (s *Server) updateAlias(q *request, in *aliasIn) (any, error) {
	a, err := s.permitAlias(q, aliasRef{q.region, in.AliasName})
	if err != nil {
		return nil, err
	}
	k, err := s.aliasTarget(q, in)
	if err != nil {
		return nil, err
	}
	a.KeyID, a.Updated = k.ID, s.now()
	s.dirty = true
	return nil, nil
}

func (s *Server) deleteAlias(q *request, in *aliasIn) (any, error) {
	ref := aliasRef{q.region, in.AliasName}
	a, err := s.permitAlias(q, ref)
	if err != nil {
		return nil, err
	}
	q.rec.KeyID = s.arnOf(q.region, a.KeyID)
	delete(s.aliases, ref)
	s.dirty = true
	return nil, nil
}

func (s *Server) listAliases(q *request, in *listIn) (any, error) {
	if err := s.allowedWithoutKey(q, "ListAliases"); err != nil {
		return nil, err
	}
	only := ""
	if in.KeyId != "" {
		k, err := s.find(q.region, in.KeyId)
		if err != nil {
			return nil, err
		}
		only = k.ID
	}
	var names []string
	for ref, a := range s.aliases {
		if ref.Region == q.region && (only == "" || a.KeyID == only) {
			names = append(names, ref.Name)
		}
	}
	sort.Strings(names)
	names, next, err := page(names, in.Limit, 50, in.Marker)
	if err != nil {
		return nil, err
	}
	type entry struct {
		AliasName, AliasArn, TargetKeyId string
		CreationDate, LastUpdatedDate    epoch
	}
	out := struct {
		Aliases    []entry
		NextMarker string `json:",omitempty"`
		Truncated  bool
	}{[]entry{}, next, next != ""}
	for _, name := range names {
		ref := aliasRef{q.region, name}
		a := s.aliases[ref]
		out.Aliases = append(out.Aliases, entry{name, s.aliasARN(ref), a.KeyID, epoch(a.Created), epoch(a.Updated)})
	}
	return out, nil
}
