package kmsserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"time"
)

// savedState is the state file: JSON, key material in the clear.
type savedState struct {
	Version    int                     `json:"version"`
	Account    string                  `json:"account"`
	OffsetS    int64                   `json:"clock_offset_s"`
	Keys       []*key                  `json:"keys"`
	Materials  map[string]*materialSet `json:"materials"`
	Aliases    []savedAlias            `json:"aliases"`
	Principals []Principal             `json:"principals"`
}

type savedAlias struct {
	Region string `json:"region"`
	Name   string `json:"name"`
	alias
}

const stateVersion = 1

// save writes the state file if there is one and something changed.
func (s *Server) save() error {
	if !s.dirty || s.stateFile == "" {
		return nil
	}
	st := savedState{
		Version: stateVersion, Account: s.account, OffsetS: int64(s.offset / time.Second),
		Materials: s.sets, Principals: sortedPrincipals(s.principals),
	}
	for _, k := range s.keys {
		st.Keys = append(st.Keys, k)
	}
	sort.Slice(st.Keys, func(i, j int) bool {
		return st.Keys[i].Region+st.Keys[i].ID < st.Keys[j].Region+st.Keys[j].ID
	})
	for ref, a := range s.aliases {
		st.Aliases = append(st.Aliases, savedAlias{ref.Region, ref.Name, *a})
	}
	sort.Slice(st.Aliases, func(i, j int) bool {
		return st.Aliases[i].Region+st.Aliases[i].Name < st.Aliases[j].Region+st.Aliases[j].Name
	})
	text, err := json.MarshalIndent(st, "", " ")
	if err == nil {
		err = replaceFile(s.stateFile, text)
	}
	if err != nil {
		return fmt.Errorf("kmsserver: state file: %w", err)
	}
	s.dirty = false
	return nil
}

// replaceFile puts data in place of path, whole or not at all. It does not
// fsync: the state outlives the process, not the machine.
func replaceFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".tmp*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

func sortedPrincipals(m map[string]*Principal) []Principal {
	out := make([]Principal, 0, len(m))
	for _, p := range m {
		out = append(out, *p)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].AccessKeyID < out[j].AccessKeyID })
	return out
}

// load reads the state file; a missing one is an empty state.
func (s *Server) load() error {
	if s.stateFile == "" {
		return nil
	}
	text, err := os.ReadFile(s.stateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	var st savedState
	if err := json.Unmarshal(text, &st); err != nil {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	if st.Version != stateVersion || st.Account != s.account {
		return fmt.Errorf("%w: version %d, account %q", ErrState, st.Version, st.Account)
	}
	s.offset = time.Duration(st.OffsetS) * time.Second
	for i := range st.Principals {
		if err := st.Principals[i].complete(); err != nil {
			return fmt.Errorf("%w: %w", ErrState, err)
		}
		s.principals[st.Principals[i].AccessKeyID] = &st.Principals[i]
	}
	return s.loadKeys(&st)
}

func (s *Server) loadKeys(st *savedState) error {
	for id, set := range st.Materials {
		if set == nil || len(set.Versions) == 0 || set.Rotation && set.PeriodDays < 1 {
			return fmt.Errorf("%w: key %s has no material", ErrState, id)
		}
		for _, m := range set.Versions {
			if len(m.ID) != 2*materialLen || len(m.Bytes) != materialLen {
				return fmt.Errorf("%w: material of key %s", ErrState, id)
			}
		}
		s.sets[id] = set
	}
	for _, k := range st.Keys {
		if k == nil || !keyIDForm.MatchString(k.ID) || !regionForm.MatchString(k.Region) || s.sets[k.ID] == nil {
			return fmt.Errorf("%w: a key without id, Region or material", ErrState)
		}
		k.set = s.sets[k.ID]
		if err := s.setPolicy(k, k.Policy); err != nil {
			return fmt.Errorf("%w: key %s: %w", ErrState, k.ID, err)
		}
		s.keys[keyRef{k.Region, k.ID}] = k
	}
	for _, a := range st.Aliases {
		if s.keys[keyRef{a.Region, a.KeyID}] == nil {
			return fmt.Errorf("%w: alias %s names no key", ErrState, a.Name)
		}
		s.aliases[aliasRef{a.Region, a.Name}] = &alias{a.KeyID, a.Created, a.Updated}
	}
	return nil
}
