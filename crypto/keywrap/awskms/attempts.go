package awskms

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/kmsfs/kmsfs/crypto/keywrap"
)

// dryRunCode is what KMS answers to a DryRun that would have succeeded.
const dryRunCode = "DryRunOperation"

// subject is what an operation is about, kept in the SDK's stack for the
// attempts that it makes.
type subject struct {
	key    string
	dryRun bool
}

type subjectKey struct{}

// subjectOf reads an operation's input. The key of ReEncrypt is the
// destination, as in CloudTrail.
func subjectOf(input any) subject {
	switch in := input.(type) {
	case *kms.GenerateDataKeyInput:
		return subject{aws.ToString(in.KeyId), aws.ToBool(in.DryRun)}
	case *kms.EncryptInput:
		return subject{aws.ToString(in.KeyId), aws.ToBool(in.DryRun)}
	case *kms.DecryptInput:
		return subject{aws.ToString(in.KeyId), aws.ToBool(in.DryRun)}
	case *kms.ReEncryptInput:
		return subject{aws.ToString(in.DestinationKeyId), aws.ToBool(in.DryRun)}
	case *kms.DescribeKeyInput:
		return subject{aws.ToString(in.KeyId), false}
	case *kms.GetKeyRotationStatusInput:
		return subject{aws.ToString(in.KeyId), false}
	case *kms.ListKeyRotationsInput:
		return subject{aws.ToString(in.KeyId), false}
	}
	return subject{}
}

// recordAttempts makes an operation add each of its HTTP attempts, which the
// SDK's retries make below the Initialize step and above the Deserialize step,
// to the Trace of its context. A request that could not be signed is none.
func recordAttempts(stack *middleware.Stack) error {
	err := stack.Initialize.Add(middleware.InitializeMiddlewareFunc("kmsfsSubject",
		func(ctx context.Context, in middleware.InitializeInput, next middleware.InitializeHandler) (middleware.InitializeOutput, middleware.Metadata, error) {
			return next.HandleInitialize(middleware.WithStackValue(ctx, subjectKey{}, subjectOf(in.Parameters)), in)
		}), middleware.Before)
	if err != nil {
		return err
	}
	return stack.Deserialize.Add(middleware.DeserializeMiddlewareFunc("kmsfsAttempt",
		func(ctx context.Context, in middleware.DeserializeInput, next middleware.DeserializeHandler) (middleware.DeserializeOutput, middleware.Metadata, error) {
			start := time.Now()
			out, metadata, err := next.HandleDeserialize(ctx, in)
			id, _ := awsmiddleware.GetRequestIDMetadata(metadata)
			if rec, ok := ctx.Value(recorderKey{}).(*recorder); ok {
				rec.requestID = clean(id, 100)
			}
			about, _ := middleware.GetStackValue(ctx, subjectKey{}).(subject)
			a := keywrap.Attempt{Op: awsmiddleware.GetOperationName(ctx), Key: about.key, DryRun: about.dryRun,
				RequestID: clean(id, 100), At: start, Took: time.Since(start), Code: errorCode(out.RawResponse, err)}
			if about.dryRun && strings.TrimSuffix(a.Code, "Exception") == dryRunCode {
				a.Code = ""
			}
			keywrap.TraceOf(ctx).Add(a)
			return out, metadata, err
		}), middleware.Before)
}

// errorCode names an attempt's failure: the service's code, the HTTP status of
// an answer that has none (a proxy's, say), or keywrap.NoAnswer.
func errorCode(raw any, err error) string {
	var api smithy.APIError
	resp, answered := raw.(*smithyhttp.Response)
	switch {
	case err == nil:
		return ""
	case errors.As(err, &api):
		return clean(api.ErrorCode(), 100)
	case answered && resp != nil && resp.Response != nil && resp.StatusCode != 0:
		return fmt.Sprintf("HTTP %d", resp.StatusCode)
	}
	return keywrap.NoAnswer
}
