package kmsserver

import (
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Status is the answer of GET /admin/status.
type Status struct {
	URL      string `json:"url"`
	AdminURL string `json:"admin_url"`
	Account  string `json:"account"`
	Region   string `json:"region"`
	Keys     int    `json:"keys"`
	Calls    int    `json:"calls"`
	Outage   Outage `json:"outage,omitempty"`
}

// adminHandler serves the admin API, JSON both ways:
//
//	GET    /admin/status
//	GET    /admin/calls                     []Call
//	DELETE /admin/calls                     forget them
//	GET    /admin/calls/count               OpCount by operation
//	GET    /admin/faults                    Faults
//	PUT    /admin/faults                    replace all
//	DELETE /admin/faults                    end all
//	POST   /admin/faults                    add a Fault; answers {"id": n}
//	DELETE /admin/faults/{id}
//	GET    /admin/principals                []Principal, secrets left out
//	POST   /admin/principals                add or replace a Principal
//	POST   /admin/principals/{id}/expired   {"expired": bool}
//	POST   /admin/keys                      KeyOptions; answers {"arn": …}
//	POST   /admin/keys/policy               {"key": …, "policy": {…}}
//	POST   /admin/keys/material-expired     {"key": …, "expired": bool}
//	POST   /admin/clock                     {"advance_s": n}
//
// Errors are {"error": text}. Whoever can reach the port may do all of it.
func (s *Server) adminHandler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /admin/status", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.status(), nil) })
	m.HandleFunc("GET /admin/calls", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.Calls(), nil) })
	m.HandleFunc("DELETE /admin/calls", func(w http.ResponseWriter, _ *http.Request) { s.ResetCalls(); answer(w, nil, nil) })
	m.HandleFunc("GET /admin/calls/count", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.Counts(), nil) })
	s.adminFaults(m)
	m.HandleFunc("GET /admin/principals", func(w http.ResponseWriter, _ *http.Request) {
		list := s.Principals()
		for i := range list {
			list[i].SecretAccessKey, list[i].SessionToken = "", ""
		}
		answer(w, list, nil)
	})
	m.HandleFunc("POST /admin/principals", take(func(_ *http.Request, p *Principal) (any, error) {
		return nil, s.AddPrincipal(*p)
	}))
	type expired struct {
		Key     string `json:"key"`
		Expired bool   `json:"expired"`
	}
	m.HandleFunc("POST /admin/principals/{id}/expired", take(func(r *http.Request, in *expired) (any, error) {
		return nil, s.SetExpired(r.PathValue("id"), in.Expired)
	}))
	m.HandleFunc("POST /admin/keys", take(func(_ *http.Request, k *KeyOptions) (any, error) {
		arn, err := s.CreateKey(*k)
		return map[string]string{"arn": arn}, err
	}))
	m.HandleFunc("POST /admin/keys/material-expired", take(func(_ *http.Request, in *expired) (any, error) {
		return nil, s.SetMaterialExpired(in.Key, in.Expired)
	}))
	type policy struct {
		Key    string          `json:"key"`
		Policy json.RawMessage `json:"policy"`
	}
	m.HandleFunc("POST /admin/keys/policy", take(func(_ *http.Request, in *policy) (any, error) {
		return nil, s.SetPolicy(in.Key, string(in.Policy))
	}))
	type clock struct {
		AdvanceS int64 `json:"advance_s"`
	}
	m.HandleFunc("POST /admin/clock", take(func(_ *http.Request, in *clock) (any, error) {
		return nil, s.Advance(time.Duration(in.AdvanceS) * time.Second)
	}))
	return browserless(m)
}

func (s *Server) adminFaults(m *http.ServeMux) {
	m.HandleFunc("GET /admin/faults", func(w http.ResponseWriter, _ *http.Request) { answer(w, s.Faults(), nil) })
	m.HandleFunc("PUT /admin/faults", take(func(_ *http.Request, f *Faults) (any, error) { return nil, s.SetFaults(*f) }))
	m.HandleFunc("DELETE /admin/faults", func(w http.ResponseWriter, _ *http.Request) { answer(w, nil, s.SetFaults(Faults{})) })
	m.HandleFunc("POST /admin/faults", take(func(_ *http.Request, f *Fault) (any, error) {
		id, err := s.AddFault(*f)
		return map[string]int{"id": id}, err
	}))
	m.HandleFunc("DELETE /admin/faults/{id}", func(w http.ResponseWriter, r *http.Request) {
		id, err := strconv.Atoi(r.PathValue("id"))
		if err != nil || !s.RemoveFault(id) {
			w.WriteHeader(http.StatusNotFound)
			answer(w, map[string]string{"error": "no such fault"}, nil)
			return
		}
		answer(w, nil, nil)
	})
}

// browserless keeps web pages that the developer has open from driving the
// admin API: browsers send Origin, tools do not.
func browserless(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Origin") != "" || strings.HasPrefix(r.Header.Get("Sec-Fetch-Site"), "cross-") {
			http.Error(w, "not for browsers", http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func (s *Server) status() Status {
	st := Status{
		URL: s.URL(), AdminURL: s.AdminURL(), Account: s.account, Region: s.region,
		Calls: s.Count(""), Outage: s.Faults().Outage,
	}
	s.mu.Lock()
	st.Keys = len(s.keys)
	s.mu.Unlock()
	return st
}

// take decodes a request's body, strictly, and answers f's result.
func take[In any](f func(*http.Request, *In) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		in := new(In)
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		dec.DisallowUnknownFields()
		err := dec.Decode(in)
		if err == io.EOF {
			err = nil // an empty body is the zero value
		}
		if err != nil {
			answer(w, nil, err)
			return
		}
		out, err := f(r, in)
		answer(w, out, err)
	}
}

func answer(w http.ResponseWriter, out any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		out = map[string]string{"error": err.Error()}
	}
	if out == nil {
		out = struct{}{}
	}
	_ = json.NewEncoder(w).Encode(out) // the client may be gone
}
