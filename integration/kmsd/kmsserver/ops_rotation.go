package kmsserver

import "fmt"

// rotating finds the key of an operation on rotation. What AWS refuses for
// replicas belongs to their primary.
func (s *Server) rotating(q *request, ref string, change bool) (*key, error) {
	k, err := s.target(q, q.op, ref, nil)
	if err != nil {
		return nil, err
	}
	if k.state() == statePendingImport {
		return nil, fail("UnsupportedOperationException", "%s has imported key material", s.arn(k))
	}
	if !change {
		return k, nil
	}
	if k.isReplica() {
		return nil, fail("UnsupportedOperationException", "%s is a replica: rotate its primary key", s.arn(k))
	}
	return k, s.usable(k)
}

type enableKeyRotationIn struct {
	KeyId                string
	RotationPeriodInDays *int
}

func (s *Server) enableKeyRotation(q *request, in *enableKeyRotationIn) (any, error) {
	days := rotationDefaultDays
	if in.RotationPeriodInDays != nil {
		days = *in.RotationPeriodInDays
	}
	if days < 90 || days > 2560 {
		return nil, constraint("rotationPeriodInDays", "Member must have value between 90 and 2560")
	}
	k, err := s.rotating(q, in.KeyId, true)
	if err != nil {
		return nil, err
	}
	if in.RotationPeriodInDays != nil || !k.set.Rotation {
		k.set.EnabledAt = s.now()
		k.set.PeriodDays = days
	}
	k.set.Rotation = true
	s.dirty = true
	return nil, nil
}

func (s *Server) disableKeyRotation(q *request, in *keyIn) (any, error) {
	k, err := s.rotating(q, in.KeyId, true)
	if err != nil {
		return nil, err
	}
	k.set.Rotation = false
	s.dirty = true
	return nil, nil
}

func (s *Server) getKeyRotationStatus(q *request, in *keyIn) (any, error) {
	k, err := s.rotating(q, in.KeyId, false)
	if err != nil {
		return nil, err
	}
	out := struct {
		KeyId                string
		KeyRotationEnabled   bool
		RotationPeriodInDays int    `json:",omitempty"`
		NextRotationDate     *epoch `json:",omitempty"`
	}{KeyId: s.arn(k)}
	if k.set.Rotation && s.alive(k) == nil {
		out.KeyRotationEnabled, out.RotationPeriodInDays = true, k.set.PeriodDays
		out.NextRotationDate = maybe(k.set.next())
	}
	return out, nil
}

func (s *Server) rotateKeyOnDemand(q *request, in *keyIn) (any, error) {
	k, err := s.rotating(q, in.KeyId, true)
	if err != nil {
		return nil, err
	}
	if k.set.OnDemand >= maxOnDemandRotations {
		return nil, fail("LimitExceededException", "%s has been rotated on demand %d times", s.arn(k), k.set.OnDemand)
	}
	k.set.add(rotationOnDemand, s.now())
	k.set.OnDemand++
	s.dirty = true
	q.rec.KeyMaterialID = k.set.current().ID
	return keyIn{s.arn(k)}, nil
}

func (s *Server) listKeyRotations(q *request, in *listIn) (any, error) {
	k, err := s.rotating(q, in.KeyId, false)
	if err != nil {
		return nil, err
	}
	all := false
	switch in.IncludeKeyMaterial {
	case "", "ROTATIONS_ONLY":
	case "ALL_KEY_MATERIAL":
		all = true
	default:
		return nil, constraint("includeKeyMaterial", fmt.Sprintf(enumRule, "ALL_KEY_MATERIAL, ROTATIONS_ONLY"))
	}
	type entry struct {
		KeyId            string
		KeyMaterialId    string
		KeyMaterialState string
		RotationDate     *epoch `json:",omitempty"`
		RotationType     string `json:",omitempty"`
	}
	entries := map[string]entry{}
	var order []string
	for i, m := range k.set.Versions {
		if m.Type == "" && !all {
			continue
		}
		e := entry{KeyId: k.ID, KeyMaterialId: m.ID, KeyMaterialState: "NON_CURRENT", RotationType: m.Type}
		if i == len(k.set.Versions)-1 {
			e.KeyMaterialState = "CURRENT"
		}
		if m.Type != "" {
			e.RotationDate = maybe(m.Created)
		}
		name := fmt.Sprintf("%08d", i)
		entries[name] = e
		order = append(order, name)
	}
	order, next, err := page(order, in.Limit, 100, in.Marker)
	if err != nil {
		return nil, err
	}
	out := struct {
		Rotations  []entry
		NextMarker string `json:",omitempty"`
		Truncated  bool
	}{[]entry{}, next, next != ""}
	for _, name := range order {
		out.Rotations = append(out.Rotations, entries[name])
	}
	return out, nil
}
