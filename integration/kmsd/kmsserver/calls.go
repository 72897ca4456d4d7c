package kmsserver

import (
	"encoding/json"
	"fmt"
	"os"
	"sync"
	"time"
)

// Call is the record of one call, in the words of CloudTrail. It never holds
// plaintext, data keys or ciphertext.
type Call struct {
	EventTime    time.Time    `json:"eventTime"`
	EventName    string       `json:"eventName"` // "" if the operation is unknown
	AWSRegion    string       `json:"awsRegion,omitempty"`
	RequestID    string       `json:"requestID"`
	UserIdentity UserIdentity `json:"userIdentity"`
	// KeyID is the key's ARN where the key exists, else what the caller gave;
	// for ReEncrypt the destination.
	KeyID                   string            `json:"keyId,omitempty"`
	SourceKeyID             string            `json:"sourceKeyId,omitempty"` // ReEncrypt
	KeyMaterialID           string            `json:"keyMaterialId,omitempty"`
	EncryptionContext       map[string]string `json:"encryptionContext,omitempty"` // ReEncrypt: the destination's
	SourceEncryptionContext map[string]string `json:"sourceEncryptionContext,omitempty"`
	DryRun                  bool              `json:"dryRun,omitempty"`
	ErrorCode               string            `json:"errorCode,omitempty"` // "" for a success
	ErrorMessage            string            `json:"errorMessage,omitempty"`
	// Injected names the fault that answered: "error", "throttle", "outage",
	// "hang", "reset", or "abandoned" for a caller that left during latency.
	// Calls that got no answer have ErrorCode CodeNoAnswer.
	Injected string `json:"injected,omitempty"`
}

// CodeNoAnswer is the ErrorCode of a call that was never answered.
const CodeNoAnswer = "kmsd:NoAnswer"

// UserIdentity is the caller. ARN is empty for an unknown access key.
type UserIdentity struct {
	AccessKeyID string `json:"accessKeyId,omitempty"`
	ARN         string `json:"arn,omitempty"`
}

func (c *Call) fill(p *peeked) {
	c.DryRun = p.DryRun
	c.KeyID = p.KeyId
	c.EncryptionContext = p.EncryptionContext
	if p.DestinationKeyId != "" {
		c.KeyID, c.SourceKeyID = p.DestinationKeyId, p.SourceKeyId
		c.EncryptionContext, c.SourceEncryptionContext = p.DestinationEncryptionContext, p.SourceEncryptionContext
	}
	if p.TargetKeyId != "" {
		c.KeyID = p.TargetKeyId
	}
}

// resolveForLog replaces key references by ARNs and names the key behind a
// ciphertext blob.
func (s *Server) resolveForLog(q *request) {
	if id, material, ok := blobIDs(q.peek.CiphertextBlob); ok {
		behind := &q.rec.KeyID
		if q.peek.DestinationKeyId != "" {
			behind = &q.rec.SourceKeyID
		} else {
			q.rec.KeyMaterialID = material
		}
		if *behind == "" {
			*behind = s.arnOf(q.region, id)
		}
	}
	for _, ref := range []*string{&q.rec.KeyID, &q.rec.SourceKeyID} {
		if *ref == "" {
			continue
		}
		if k, err := s.find(q.region, *ref); err == nil {
			*ref = s.arn(k)
		}
	}
}

type callLog struct {
	mu    sync.Mutex
	calls []Call
	file  *os.File
	err   error // first failure to write
}

func (l *callLog) open(path string) error {
	if path == "" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("kmsserver: call log: %w", err)
	}
	l.file = f
	return nil
}

func (l *callLog) add(c Call) {
	line, err := json.Marshal(c)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.calls = append(l.calls, c)
	if l.file == nil {
		return
	}
	if err == nil {
		_, err = l.file.Write(append(line, '\n'))
	}
	if l.err == nil {
		l.err = err
	}
}

func (l *callLog) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return l.err
	}
	if err := l.file.Close(); l.err == nil {
		l.err = err
	}
	l.file = nil
	return l.err
}

// Calls returns the calls since the start or the last ResetCalls, oldest
// first, answered or not; connections refused during OutageRefuse are not
// calls. The encryption contexts are shared: do not change them.
func (s *Server) Calls() []Call {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return append([]Call(nil), s.log.calls...)
}

// Count returns how many of Calls are of the operation, "" for all.
func (s *Server) Count(operation string) int {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	n := 0
	for i := range s.log.calls {
		if operation == "" || s.log.calls[i].EventName == operation {
			n++
		}
	}
	return n
}

// OpCount counts the calls of one operation.
type OpCount struct {
	Calls     int `json:"calls"`               // all of them
	OK        int `json:"ok"`                  // successes
	DryRun    int `json:"dry_run,omitempty"`   // asked with DryRun, whatever the answer
	Throttled int `json:"throttled,omitempty"` // answered ThrottlingException
	NoAnswer  int `json:"no_answer,omitempty"` // never answered
}

// Counts counts Calls by operation; "" is what named no operation.
func (s *Server) Counts() map[string]OpCount {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	out := map[string]OpCount{}
	for i := range s.log.calls {
		call := &s.log.calls[i]
		c := out[call.EventName]
		c.Calls++
		if call.DryRun {
			c.DryRun++
		}
		switch call.ErrorCode {
		case "":
			c.OK++
		case "ThrottlingException":
			c.Throttled++
		case CodeNoAnswer:
			c.NoAnswer++
		}
		out[call.EventName] = c
	}
	return out
}

// ResetCalls forgets the calls kept in memory; the log file keeps them.
func (s *Server) ResetCalls() {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	s.log.calls = nil
}
