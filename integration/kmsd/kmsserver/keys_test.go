package kmsserver

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
)

func describe(t *testing.T, c *kms.Client, keyID string) *types.KeyMetadata {
	t.Helper()
	out, err := c.DescribeKey(context.Background(), &kms.DescribeKeyInput{KeyId: &keyID})
	return must(t, out, err).KeyMetadata
}

func TestCreateDescribeList(t *testing.T) {
	ctx := context.Background()
	_, c := start(t)
	made, err := c.CreateKey(ctx, &kms.CreateKeyInput{
		Description: aws.String("patients"), KeySpec: types.KeySpecSymmetricDefault,
		Tags: []types.Tag{{TagKey: aws.String("team"), TagValue: aws.String("storage")}},
	})
	m := must(t, made, err).KeyMetadata
	if m.KeyState != types.KeyStateEnabled || !m.Enabled || aws.ToString(m.Description) != "patients" ||
		aws.ToBool(m.MultiRegion) || time.Since(*m.CreationDate) > time.Minute || len(*m.CurrentKeyMaterialId) != 64 {
		t.Errorf("CreateKey = %+v", m)
	}
	if got := describe(t, c, *m.KeyId); *got.Arn != *m.Arn {
		t.Errorf("DescribeKey = %s, want %s", *got.Arn, *m.Arn)
	}
	tags, err := c.ListResourceTags(ctx, &kms.ListResourceTagsInput{KeyId: m.KeyId})
	if must(t, tags, err); len(tags.Tags) != 1 || *tags.Tags[0].TagValue != "storage" {
		t.Errorf("tags = %+v", tags.Tags)
	}
	for range 4 {
		out, err := c.CreateKey(ctx, &kms.CreateKeyInput{})
		must(t, out, err)
	}
	seen := map[string]bool{}
	pages := kms.NewListKeysPaginator(c, &kms.ListKeysInput{Limit: aws.Int32(2)})
	n := 0
	for ; pages.HasMorePages(); n++ {
		out, err := pages.NextPage(ctx)
		for _, k := range must(t, out, err).Keys {
			seen[*k.KeyArn] = true
		}
	}
	if len(seen) != 5 || n != 3 || !seen[*m.Arn] {
		t.Errorf("ListKeys: %d keys on %d pages, want 5 on 3", len(seen), n)
	}
	_, err = c.ListKeys(ctx, &kms.ListKeysInput{Marker: aws.String("???")})
	wantCode(t, "bad marker", err, "InvalidMarkerException")
	_, err = c.CreateKey(ctx, &kms.CreateKeyInput{KeySpec: types.KeySpecRsa2048, KeyUsage: types.KeyUsageTypeSignVerify})
	wantCode(t, "RSA key", err, "UnsupportedOperationException")
	_, err = c.CreateKey(ctx, &kms.CreateKeyInput{Description: aws.String(strings.Repeat("d", 8193))})
	wantCode(t, "long description", err, "ValidationException")
}

func TestAliases(t *testing.T) {
	ctx := context.Background()
	s, c := start(t)
	a, b := newKey(t, s, KeyOptions{}), newKey(t, s, KeyOptions{Alias: "alias/other"})
	name := aws.String("alias/phi")
	create := func(name, key string) error {
		_, err := c.CreateAlias(ctx, &kms.CreateAliasInput{AliasName: &name, TargetKeyId: &key})
		return err
	}
	wantCode(t, "CreateAlias", create(*name, a), "")
	wantCode(t, "again", create(*name, a), "AlreadyExistsException")
	wantCode(t, "no prefix", create("phi", a), "ValidationException")
	wantCode(t, "bad character", create("alias/p h", a), "ValidationException")
	wantCode(t, "reserved", create("alias/aws/s3", a), "InvalidAliasNameException")
	wantCode(t, "alias of alias", create("alias/x", *name), "ValidationException")
	before := dataKey(t, c, *name, nil)
	_, err := c.UpdateAlias(ctx, &kms.UpdateAliasInput{AliasName: name, TargetKeyId: &b})
	wantCode(t, "UpdateAlias", err, "")
	if got := *dataKey(t, c, *name, nil).KeyId; got != b {
		t.Errorf("after UpdateAlias the key is %s, want %s", got, b)
	}
	_, err = decrypt(c, *name, before.CiphertextBlob, nil)
	wantCode(t, "old blob through the moved alias", err, "IncorrectKeyException")
	list, err := c.ListAliases(ctx, &kms.ListAliasesInput{KeyId: &b})
	if must(t, list, err); len(list.Aliases) != 2 || *list.Aliases[0].AliasName != "alias/other" {
		t.Errorf("ListAliases = %+v", list.Aliases)
	}
	_, err = c.DeleteAlias(ctx, &kms.DeleteAliasInput{AliasName: name})
	wantCode(t, "DeleteAlias", err, "")
	_, err = c.DeleteAlias(ctx, &kms.DeleteAliasInput{AliasName: name})
	wantCode(t, "DeleteAlias again", err, "NotFoundException")
	_, err = c.UpdateAlias(ctx, &kms.UpdateAliasInput{AliasName: name, TargetKeyId: &b})
	wantCode(t, "UpdateAlias of none", err, "NotFoundException")
}

func TestStates(t *testing.T) {
	ctx := context.Background()
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{Alias: "alias/k"})
	blob := dataKey(t, c, arn, nil).CiphertextBlob
	open := func() error { _, err := decrypt(c, arn, blob, nil); return err }
	expect := func(what string, err error, code, text string) {
		t.Helper()
		wantCode(t, what, err, code)
		if err != nil && !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v, want %q in it", what, err, text)
		}
	}
	_, err := c.DisableKey(ctx, &kms.DisableKeyInput{KeyId: &arn})
	expect("DisableKey", err, "", "")
	expect("disabled", open(), "DisabledException", arn+" is disabled.")
	_, err = c.EnableKey(ctx, &kms.EnableKeyInput{KeyId: &arn})
	expect("EnableKey", err, "", "")
	expect("enabled", open(), "", "")

	for _, days := range []int32{6, 31} {
		_, err = c.ScheduleKeyDeletion(ctx, &kms.ScheduleKeyDeletionInput{KeyId: &arn, PendingWindowInDays: &days})
		expect(fmt.Sprint(days, " days"), err, "ValidationException", "")
	}
	_, err = c.CancelKeyDeletion(ctx, &kms.CancelKeyDeletionInput{KeyId: &arn})
	expect("cancel without schedule", err, "KMSInvalidStateException", "is not pending deletion.")
	schedule := func() (*kms.ScheduleKeyDeletionOutput, error) {
		return c.ScheduleKeyDeletion(ctx, &kms.ScheduleKeyDeletionInput{KeyId: &arn, PendingWindowInDays: aws.Int32(7)})
	}
	out, err := schedule()
	if must(t, out, err); out.KeyState != types.KeyStatePendingDeletion || time.Until(*out.DeletionDate).Round(time.Hour) != 7*day {
		t.Errorf("ScheduleKeyDeletion = %+v", out)
	}
	_, err = schedule()
	expect("schedule again", err, "KMSInvalidStateException", arn+" is pending deletion.")
	expect("pending", open(), "KMSInvalidStateException", arn+" is pending deletion.")
	_, err = c.EnableKey(ctx, &kms.EnableKeyInput{KeyId: &arn})
	expect("EnableKey while pending", err, "KMSInvalidStateException", "")
	_, err = c.CancelKeyDeletion(ctx, &kms.CancelKeyDeletionInput{KeyId: &arn})
	expect("CancelKeyDeletion", err, "", "")
	if m := describe(t, c, arn); m.KeyState != types.KeyStateDisabled || m.DeletionDate != nil {
		t.Errorf("after cancel: %s, deletion date %v", m.KeyState, m.DeletionDate)
	}
	expect("cancelled", open(), "DisabledException", "")
	_, err = schedule()
	expect("schedule", err, "", "")
	must(t, 0, s.Advance(8*day))
	expect("deleted", open(), "NotFoundException", "does not exist")
	if _, err := decrypt(c, "", blob, nil); code(err) != "AccessDeniedException" {
		t.Errorf("blob of a deleted key: %v", err)
	}
	_, err = c.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: aws.String("alias/k")})
	expect("alias of a deleted key", err, "NotFoundException", "alias/k")
}

func TestExpiredMaterial(t *testing.T) {
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{Alias: "alias/k"})
	blob := dataKey(t, c, arn, nil).CiphertextBlob
	must(t, 0, s.SetMaterialExpired("alias/k", true))
	_, err := decrypt(c, arn, blob, nil)
	wantCode(t, "material expired", err, "KMSInvalidStateException")
	if err == nil || !strings.Contains(err.Error(), arn+" is pending import.") {
		t.Errorf("text = %v", err)
	}
	if got := describe(t, c, arn).KeyState; got != types.KeyStatePendingImport {
		t.Errorf("state = %s", got)
	}
	must(t, 0, s.SetMaterialExpired(arn, false))
	_, err = decrypt(c, arn, blob, nil)
	wantCode(t, "material back", err, "")
}

func TestRotation(t *testing.T) {
	ctx := context.Background()
	s, c := start(t)
	arn := newKey(t, s, KeyOptions{})
	old := dataKey(t, c, arn, nil)
	out, err := c.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: &arn})
	must(t, out, err)
	fresh := dataKey(t, c, arn, nil)
	if *fresh.KeyMaterialId == *old.KeyMaterialId {
		t.Error("material id unchanged by a rotation")
	}
	if got := *describe(t, c, arn).CurrentKeyMaterialId; got != *fresh.KeyMaterialId {
		t.Errorf("CurrentKeyMaterialId = %s, want %s", got, *fresh.KeyMaterialId)
	}
	again, err := decrypt(c, arn, old.CiphertextBlob, nil)
	if must(t, again, err); *again.KeyMaterialId != *old.KeyMaterialId || !bytes.Equal(again.Plaintext, old.Plaintext) {
		t.Error("old blob opens to something else")
	}
	re, err := c.ReEncrypt(ctx, &kms.ReEncryptInput{CiphertextBlob: old.CiphertextBlob, DestinationKeyId: &arn})
	if must(t, re, err); *re.SourceKeyMaterialId != *old.KeyMaterialId || *re.DestinationKeyMaterialId != *fresh.KeyMaterialId {
		t.Error("ReEncrypt names the wrong materials")
	}

	_, err = c.EnableKeyRotation(ctx, &kms.EnableKeyRotationInput{KeyId: &arn, RotationPeriodInDays: aws.Int32(89)})
	wantCode(t, "89 days", err, "ValidationException")
	_, err = c.EnableKeyRotation(ctx, &kms.EnableKeyRotationInput{KeyId: &arn, RotationPeriodInDays: aws.Int32(100)})
	wantCode(t, "EnableKeyRotation", err, "")
	st, err := c.GetKeyRotationStatus(ctx, &kms.GetKeyRotationStatusInput{KeyId: &arn})
	if must(t, st, err); !st.KeyRotationEnabled || *st.RotationPeriodInDays != 100 || time.Until(*st.NextRotationDate).Round(time.Hour) != 100*day {
		t.Errorf("status = %+v", st)
	}
	must(t, 0, s.Advance(201*day))
	list, err := c.ListKeyRotations(ctx, &kms.ListKeyRotationsInput{KeyId: &arn})
	must(t, list, err)
	var kinds []types.RotationType
	for _, r := range list.Rotations {
		kinds = append(kinds, r.RotationType)
	}
	if got, want := fmt.Sprint(kinds), "[ON_DEMAND AUTOMATIC AUTOMATIC]"; got != want {
		t.Errorf("rotations = %s, want %s", got, want)
	}
	all, err := c.ListKeyRotations(ctx, &kms.ListKeyRotationsInput{KeyId: &arn, IncludeKeyMaterial: types.IncludeKeyMaterialAllKeyMaterial})
	if must(t, all, err); len(all.Rotations) != 4 || all.Rotations[3].KeyMaterialState != types.KeyMaterialStateCurrent || *all.Rotations[0].KeyMaterialId != *old.KeyMaterialId {
		t.Errorf("all material = %+v", all.Rotations)
	}
	_, err = c.DisableKeyRotation(ctx, &kms.DisableKeyRotationInput{KeyId: &arn})
	wantCode(t, "DisableKeyRotation", err, "")
	st, err = c.GetKeyRotationStatus(ctx, &kms.GetKeyRotationStatusInput{KeyId: &arn})
	if must(t, st, err); st.KeyRotationEnabled {
		t.Error("rotation still enabled")
	}
	for range maxOnDemandRotations - 1 {
		out, err := c.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: &arn})
		must(t, out, err)
	}
	_, err = c.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: &arn})
	wantCode(t, "one rotation too many", err, "LimitExceededException")
	again, err = decrypt(c, arn, old.CiphertextBlob, nil)
	must(t, again, err)
}

func TestMultiRegion(t *testing.T) {
	ctx := context.Background()
	s, east := start(t)
	west := client(s, DefaultPrincipal(), "us-west-2")
	made, err := east.CreateKey(ctx, &kms.CreateKeyInput{MultiRegion: aws.Bool(true)})
	id := must(t, made, err).KeyMetadata.KeyId
	if !strings.HasPrefix(*id, "mrk-") || len(*id) != 36 {
		t.Errorf("id = %s", *id)
	}
	dk := dataKey(t, east, *id, phi)
	_, err = decrypt(west, "", dk.CiphertextBlob, phi)
	wantCode(t, "before replication", err, "AccessDeniedException")
	rep, err := east.ReplicateKey(ctx, &kms.ReplicateKeyInput{KeyId: id, ReplicaRegion: aws.String("us-west-2")})
	m := must(t, rep, err).ReplicaKeyMetadata
	if *m.KeyId != *id || !strings.Contains(*m.Arn, ":us-west-2:") || m.MultiRegionConfiguration.MultiRegionKeyType != types.MultiRegionKeyTypeReplica {
		t.Errorf("replica = %+v", m)
	}
	out, err := decrypt(west, *m.Arn, dk.CiphertextBlob, phi)
	if must(t, out, err); !bytes.Equal(out.Plaintext, dk.Plaintext) || *out.KeyId != *m.Arn {
		t.Errorf("the replica opens as %s", *out.KeyId)
	}
	_, err = east.ReplicateKey(ctx, &kms.ReplicateKeyInput{KeyId: id, ReplicaRegion: aws.String("us-west-2")})
	wantCode(t, "replicated twice", err, "AlreadyExistsException")
	_, err = west.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: id})
	wantCode(t, "rotate a replica", err, "UnsupportedOperationException")
	rot, err := east.RotateKeyOnDemand(ctx, &kms.RotateKeyOnDemandInput{KeyId: id})
	must(t, rot, err)
	if a, b := dataKey(t, east, *id, nil).KeyMaterialId, dataKey(t, west, *id, nil).KeyMaterialId; *a != *b {
		t.Error("materials differ between Regions after a rotation")
	}
	single := newKey(t, s, KeyOptions{})
	_, err = east.ReplicateKey(ctx, &kms.ReplicateKeyInput{KeyId: &single, ReplicaRegion: aws.String("us-west-2")})
	wantCode(t, "replicate a single-Region key", err, "UnsupportedOperationException")

	del, err := east.ScheduleKeyDeletion(ctx, &kms.ScheduleKeyDeletionInput{KeyId: id, PendingWindowInDays: aws.Int32(7)})
	if must(t, del, err); del.KeyState != types.KeyStatePendingReplicaDeletion || del.DeletionDate != nil {
		t.Errorf("deletion of a primary = %+v", del)
	}
	del, err = west.ScheduleKeyDeletion(ctx, &kms.ScheduleKeyDeletionInput{KeyId: id, PendingWindowInDays: aws.Int32(7)})
	must(t, del, err)
	must(t, 0, s.Advance(8*day))
	if got := describe(t, east, *id).KeyState; got != types.KeyStatePendingDeletion {
		t.Errorf("primary without replicas is %s", got)
	}
	must(t, 0, s.Advance(8*day))
	_, err = east.DescribeKey(ctx, &kms.DescribeKeyInput{KeyId: id})
	wantCode(t, "primary gone", err, "NotFoundException")
}
