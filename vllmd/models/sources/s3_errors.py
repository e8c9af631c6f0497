"""Pure: what a store, or botocore on the way to it, says, as errors of our tree. Their texts are hostile: bounded, one line,
and without the secrets that were sent."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Any

from vllmd.errors import ConfigError, ModelNotFound, PermissionMissing, SourceUnavailable, VllmdError

ANONYMOUS = "no credentials"
ENVIRONMENT = "the keys in AWS_ACCESS_KEY_ID"
MAX_TEXT = 300
_MAX_BODY = 16384
_CREDENTIALS_HINT = (
    "Give keys as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in ~/.aws/credentials, or, for the service, in "
    "/etc/credstore/vllmd.s3-credentials (the same format)."
)
_REFUSED = frozenset(
    {
        "AccessDenied", "AccountProblem", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId", "InvalidSecurity", "InvalidToken",
        "NotSignedUp", "SignatureDoesNotMatch", "TokenRefreshRequired", "Unauthorized", "UnauthorizedAccess", "401", "403",
    }
)  # fmt: skip
_BUSY = frozenset({"InternalError", "RequestLimitExceeded", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException"})
_SKEWED = frozenset({"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"})
_ELSEWHERE = frozenset(
    {"301", "302", "307", "308", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "TemporaryRedirect"}
)
_CHANGED = frozenset({"412", "416", "InvalidRange", "NoSuchKey", "PreconditionFailed"})
_REFUSED_LOCALLY = frozenset(
    {"CredentialRetrievalError", "MetadataRetrievalError", "NoCredentialsError", "PartialCredentialsError", "RefreshWithMFAUnsupportedError"}
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where is asked, and as whom, for messages. `credentials` names their kind, never them; `secrets` are what must not be
    shown if a store echoes it."""

    bucket: str
    prefix: str
    endpoint: str
    credentials: str
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def origin(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def clean(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "[redacted]")
        return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))[:MAX_TEXT]


@dataclass(frozen=True, slots=True)
class Answer:
    """An error of the store. `code` is S3's, else the HTTP status; `what` was asked for (s3://...)."""

    status: int
    code: str
    message: str = ""
    region: str = ""
    what: str = ""


def answer_of(status: int, body: bytes, what: str) -> Answer:
    """The error in an XML body: by patterns, since nothing here is worth an XML parser's risks."""
    text = body[:_MAX_BODY].decode("utf-8", "replace")
    found = {tag: match[1] if (match := re.search(rf"<{tag}>([^<]{{1,1000}})</{tag}>", text)) else "" for tag in ("Code", "Message", "Region")}
    return Answer(status, found["Code"].strip() or str(status), html.unescape(found["Message"]), html.unescape(found["Region"]), what)


def of_answer(answer: Answer, place: Place) -> VllmdError:
    """What an error of the store means."""
    said = f"{place.endpoint} answers {place.clean(answer.code)}" + (f" ({place.clean(answer.message)})" if answer.message else "")
    what, code = f"{answer.what or place.origin}: {said}", answer.code
    if code in _SKEWED:
        return SourceUnavailable("clock_wrong", what, "This host's clock is wrong: see `timedatectl`.")
    if code in _BUSY or answer.status >= 500 or answer.status == 429:
        return SourceUnavailable("source_busy", what, "The store is overloaded or failing; it is asked again.")
    if code in _ELSEWHERE or 300 <= answer.status < 400:
        region = place.clean(answer.region)
        hint = f"Set model.r2_region (R2_REGION) to {region}." if region else "Set model.r2_endpoint_url and model.r2_region to where the bucket is."
        return ConfigError("s3_wrong_region", what, hint)
    if code in ("NoSuchBucket", "InvalidBucketName"):
        hint = "Correct model.r2_bucket (R2_BUCKET), or model.r2_endpoint_url (R2_ENDPOINT_URL), which is without the bucket."
        return ConfigError("s3_no_bucket", what.replace(place.origin, f"bucket {place.bucket}", 1), hint)
    if code == "InvalidObjectState":
        return ModelNotFound("s3_archived", what, "It lies in an archive: restore it there first.")
    if code in _CHANGED:
        return SourceUnavailable("source_changed", what, "It was replaced or removed after it was listed; it is listed again.")
    if code in _REFUSED or code.startswith("KMS.") or answer.status in (401, 403) or "redential" in answer.message:
        return _refused(what, place)
    return ConfigError("s3_refused", what, "Is model.r2_endpoint_url (R2_ENDPOINT_URL) the endpoint of an S3 store?")


def _refused(what: str, place: Place) -> PermissionMissing:
    hint = _CREDENTIALS_HINT if place.credentials == ANONYMOUS else "They need s3:ListBucket on the bucket and s3:GetObject on its objects."
    return PermissionMissing("s3_refused", f"{what}; asked with {place.credentials}", hint)


def of_exception(error: Exception, place: Place) -> VllmdError:
    """What an exception of botocore means; `error` itself if it is one of ours."""
    from botocore import exceptions

    if isinstance(error, VllmdError):
        return error
    if isinstance(error, exceptions.ClientError):
        return of_answer(_answer(error.response), place)
    what, kind = f"{place.origin}: {place.clean(str(error))}", type(error).__name__
    if isinstance(error, exceptions.SSLError):
        return SourceUnavailable("tls_refused", what, "Does AWS_CA_BUNDLE name the certificates of whoever signed the store's? Is the clock right?")
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError | exceptions.EndpointConnectionError):
        return SourceUnavailable("source_unreachable", what, "Look at the network, the proxy's settings and model.r2_endpoint_url.")
    if kind in _REFUSED_LOCALLY or "SSO" in kind or "Login" in kind or "Token" in kind:
        return PermissionMissing("s3_credentials", what, _CREDENTIALS_HINT)
    if isinstance(error, exceptions.BotoCoreError):
        return ConfigError("s3_settings", what, "Look at model.r2_* and at the AWS_* settings and files.")
    return unreadable(place, place.clean(str(error)))


def unreadable(place: Place, why: str) -> SourceUnavailable:
    hint = "Is there a proxy or a sign-in page between? Is model.r2_endpoint_url (R2_ENDPOINT_URL) the endpoint of an S3 store?"
    return SourceUnavailable("source_unreadable", f"{place.origin}: {place.endpoint} does not answer with a listing of S3: {why}", hint)


def _answer(response: dict[str, Any]) -> Answer:
    error, metadata = response.get("Error", {}), response.get("ResponseMetadata", {})
    region = error.get("Region") or metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region") or ""
    status = int(metadata.get("HTTPStatusCode", 0))
    return Answer(status, str(error.get("Code") or status), str(error.get("Message") or ""), str(region))
