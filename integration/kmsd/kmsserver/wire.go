package kmsserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/kmsfs/kmsfs/integration/kmsd/sigv4"
)

const (
	contentType  = "application/x-amz-json-1.1"
	targetPrefix = "TrentService."
	maxBody      = 512 << 10 // a policy of 128 KiB in JSON escapes fits
)

// request is one call under way.
type request struct {
	op        string
	region    string
	principal *Principal
	body      []byte
	peek      peeked
	rec       Call
}

// peeked are the fields that faults and the log look at before an operation
// decodes its own input.
type peeked struct {
	KeyId                        string
	SourceKeyId                  string
	DestinationKeyId             string
	TargetKeyId                  string
	EncryptionContext            map[string]string
	SourceEncryptionContext      map[string]string
	DestinationEncryptionContext map[string]string
	CiphertextBlob               []byte
	DryRun                       bool
}

func (p *peeked) contexts() []map[string]string {
	return []map[string]string{p.EncryptionContext, p.SourceEncryptionContext, p.DestinationEncryptionContext}
}

// parseRequest reads what does not need the server's state. The request is
// usable for the log even where err is not nil.
func parseRequest(r *http.Request, body []byte) (*request, error) {
	q := &request{body: body}
	op, ok := strings.CutPrefix(r.Header.Get("X-Amz-Target"), targetPrefix)
	if ok && operations[op] != nil {
		q.op = op
	}
	q.rec.EventName = q.op
	// A field of a wrong type leaves the rest readable; the operation's own
	// decoding reports it.
	_ = json.Unmarshal(body, &q.peek)
	q.rec.fill(&q.peek)
	media, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	switch {
	case r.Method != http.MethodPost || r.URL.Path != "/" || !strings.EqualFold(strings.TrimSpace(media), contentType):
		return q, fail("UnknownOperationException", "")
	case ok && op != "" && q.op == "":
		return q, fail("UnsupportedOperationException", "kmsd does not implement this operation")
	case q.op == "":
		return q, fail("UnknownOperationException", "")
	}
	return q, nil
}

// authenticate finds the caller and the Region.
func (s *Server) authenticate(q *request, r *http.Request) error {
	auth, err := sigv4.Parse(r.Header.Get("Authorization"))
	switch {
	case errors.Is(err, sigv4.ErrMissing):
		return fail("MissingAuthenticationTokenException", "Missing Authentication Token")
	case err != nil:
		return fail("IncompleteSignatureException", "%v", err)
	}
	q.region = auth.Region
	q.rec.AWSRegion = auth.Region
	q.rec.UserIdentity.AccessKeyID = auth.AccessKeyID
	s.mu.Lock()
	p := s.principals[auth.AccessKeyID]
	s.mu.Unlock()
	if p == nil || p.SessionToken != r.Header.Get("X-Amz-Security-Token") {
		return fail("UnrecognizedClientException", "The security token included in the request is invalid.")
	}
	q.rec.UserIdentity.ARN = p.ARN
	q.principal = p
	if auth.Service != "kms" || !regionForm.MatchString(auth.Region) {
		return fail("InvalidSignatureException", "Credential should be scoped to a valid region and to service 'kms'.")
	}
	err = auth.Verify(r, q.body, p.SecretAccessKey, time.Now())
	switch {
	case errors.Is(err, sigv4.ErrIncomplete):
		return fail("IncompleteSignatureException", "%v", err)
	case errors.Is(err, sigv4.ErrSkewed):
		return fail("InvalidSignatureException", "Signature expired: %v", err)
	case err != nil:
		return fail("InvalidSignatureException", "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method. Consult the service documentation for details.")
	}
	if p.Expired {
		return fail("ExpiredTokenException", "The security token included in the request is expired")
	}
	return nil
}

// serve answers the endpoint, and the admin API under /admin/.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/admin/") {
		s.adminHandler().ServeHTTP(w, r)
		return
	}
	id := newUUID()
	w.Header().Set("x-amzn-RequestId", id)
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		refusal := fail("RequestEntityTooLargeException", "request larger than %d bytes", maxBody)
		s.mu.Lock()
		now := s.now()
		s.mu.Unlock()
		s.log.add(Call{EventTime: now, RequestID: id, ErrorCode: refusal.code, ErrorMessage: refusal.message})
		respond(w, nil, refusal)
		return
	}
	if err != nil {
		return // the client is gone
	}
	q, reqErr := parseRequest(r, body)
	q.rec.RequestID = id
	authErr := s.authenticate(q, r)
	s.mu.Lock()
	q.rec.EventTime = s.now()
	s.resolveForLog(q)
	s.mu.Unlock()

	act := s.faults.decide(q)
	if !act.wait(r.Context()) || act.silent() {
		act.record(&q.rec)
		s.log.add(q.rec)
		act.vanish(w, r)
		return
	}
	var out any
	switch {
	case act.err != nil:
		act.record(&q.rec)
		err = act.err
	case reqErr != nil:
		err = reqErr
	case authErr != nil:
		err = authErr
	default:
		out, err = s.dispatch(q)
	}
	var apiErr *apiError
	if err != nil && !errors.As(err, &apiErr) {
		apiErr = fail("KMSInternalException", "%v", err)
	}
	if apiErr != nil {
		q.rec.ErrorCode, q.rec.ErrorMessage = apiErr.code, apiErr.message
	}
	s.log.add(q.rec) // before the answer: a client that has it finds its call logged
	respond(w, out, apiErr)
}

func (s *Server) dispatch(q *request) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tick()
	out, err := operations[q.op](s, q)
	if saveErr := s.save(); err == nil && saveErr != nil {
		err = saveErr
	}
	return out, err
}

func respond(w http.ResponseWriter, out any, apiErr *apiError) {
	w.Header().Set("Content-Type", contentType)
	if apiErr != nil {
		answer := map[string]string{"__type": apiErr.code}
		if apiErr.message != "" {
			answer["message"] = apiErr.message
		}
		w.WriteHeader(apiErr.httpStatus())
		_ = json.NewEncoder(w).Encode(answer) // the client may be gone
		return
	}
	if out == nil {
		return // operations without a result answer an empty body
	}
	_ = json.NewEncoder(w).Encode(out)
}

// handler runs one operation under s.mu.
type handler func(*Server, *request) (any, error)

// op decodes an operation's input before it runs.
func op[In any](f func(*Server, *request, *In) (any, error)) handler {
	return func(s *Server, q *request) (any, error) {
		in := new(In)
		if len(q.body) > 0 {
			if err := json.Unmarshal(q.body, in); err != nil {
				return nil, &apiError{code: "SerializationException", message: "the request is not the JSON of its operation"}
			}
		}
		return f(s, q, in)
	}
}

// epoch is a time as JSON 1.1 sends it: seconds with fraction.
type epoch time.Time

func (e epoch) MarshalJSON() ([]byte, error) {
	return fmt.Appendf(nil, "%.3f", float64(time.Time(e).UnixMilli())/1000), nil
}

// maybe returns nil for the zero time, so that the field is left out.
func maybe(t time.Time) *epoch {
	if t.IsZero() {
		return nil
	}
	e := epoch(t)
	return &e
}
