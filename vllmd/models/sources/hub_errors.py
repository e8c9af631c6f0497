"""Pure but for looking at exceptions: what a hub, or its client library, says, as errors of our tree. Their texts are hostile:
bounded, one line, and without the token."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from vllmd.errors import ConfigError, ModelNotFound, PermissionMissing, SourceUnavailable, VllmdError
from vllmd.models.transfer import tls

MAX_TEXT = 300
PUT_TOKEN = "Put a token into /etc/credstore/vllmd.hf-token (the systemd credential hf-token), or set HF_TOKEN."
_GATED = ("restricted", "gated", "awaiting a review", "accept the conditions")
_BAD_TOKEN = ("invalid credentials", "expired", "invalid user token", "access token")


@dataclass(frozen=True, slots=True)
class Place:
    """Where is asked, and as whom, for messages. `token_from` names where the token came from, '' without one; `is_withheld`:
    there is one, which is not sent in clear text. `token` is what must not be shown if somebody echoes it."""

    endpoint: str
    repository: str
    revision: str = ""
    token_from: str = ""
    is_withheld: bool = False
    is_gated: bool = False
    token: str = field(default="", repr=False)

    @property
    def url(self) -> str:
        return f"{self.endpoint}/{self.repository}"

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).netloc

    def clean(self, text: str) -> str:
        if self.token:
            text = text.replace(self.token, "[redacted]")
        return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))[:MAX_TEXT]


@dataclass(frozen=True, slots=True)
class Answer:
    """An error of the hub. `code` is its own (X-Error-Code), '' where it says none; `wait` what Retry-After says; `what` was
    asked for, a URL without query."""

    status: int
    code: str = ""
    message: str = ""
    wait: str = ""
    what: str = ""


def of_answer(answer: Answer, place: Place) -> VllmdError:
    """What an answer of 4xx or 5xx means. ModelNotFound (not its child) where there is nothing of that name."""
    message = place.clean(answer.message)
    what = f"{answer.what or place.url}: {place.host} answers {answer.status}" + (f" ({message})" if message else "")
    if answer.status in (408, 425, 429) or answer.status >= 500:
        wait = f"; it wants to be left alone for {place.clean(answer.wait)} s" if answer.wait.strip().isdigit() else ""
        return SourceUnavailable("source_busy", what + wait, "The hub is overloaded, failing, or has a limit on requests; it is asked again.")
    if answer.code == "RevisionNotFound":
        return ModelNotFound("hub_no_revision", f"{place.url} has no revision {place.revision or 'main'!r}", "Give a branch, a tag or a commit that it has.")
    if answer.status == 407:
        return PermissionMissing("proxy_refused", what, "The proxy wants credentials: https_proxy=http://USER:PASSWORD@HOST:PORT.")
    if "access to this resource is disabled" in message.lower() or answer.status == 451:
        return PermissionMissing("hub_disabled", what, f"The hub itself has closed this repository; see {place.url}.")
    if _is_gated(answer, message, place):
        return _gated(what, place)
    return _other(answer, what, place)


def _is_gated(answer: Answer, message: str, place: Place) -> bool:
    if answer.code == "GatedRepo":
        return True
    if answer.status not in (401, 403) or answer.code or _is_bad_token(message, place):
        return False
    return place.is_gated or any(word in message.lower() for word in _GATED)


def _is_bad_token(message: str, place: Place) -> bool:
    return bool(place.token_from) and any(word in message.lower() for word in _BAD_TOKEN)


def _gated(what: str, place: Place) -> PermissionMissing:
    if place.token_from and not place.is_withheld:
        hint = f"Accept the licence at {place.url} with the account of the token ({place.token_from}), or give the token of one that has."
        return PermissionMissing("hub_gated", f"{what}: the model is gated, and this account may not have it", hint)
    hint = f"Accept the licence at {place.url}, make a token at {place.endpoint}/settings/tokens. {_put_token(place)}"
    return PermissionMissing("hub_gated", f"{what}: the model is gated, and no token was sent", hint)


def _put_token(place: Place) -> str:
    if place.is_withheld:
        return "The token that is set is not sent over plain http: give model.hf_endpoint (HF_ENDPOINT) as https."
    return PUT_TOKEN


def _other(answer: Answer, what: str, place: Place) -> VllmdError:
    sent = place.token_from and not place.is_withheld
    if answer.status == 401 and sent and answer.code != "RepoNotFound":
        hint = f"Make a new one at {place.endpoint}/settings/tokens. {PUT_TOKEN}"
        return PermissionMissing("hub_token_refused", f"{what}: it does not take the token from {place.token_from}", hint)
    if answer.code == "RepoNotFound" or answer.status == 401:
        why = f"no such repository, or it is private: {_maybe(place)}"
        return ModelNotFound("hub_no_repository", f"{place.url}: {why}", "Look at model.id (VLLM_MODEL_ID).")
    if answer.status == 403:
        hint = f"The token from {place.token_from} needs to read this repository." if sent else _put_token(place)
        return PermissionMissing("hub_refused", what, hint)
    if answer.status in (404, 410) and not answer.code:
        return ModelNotFound("hub_no_repository", what, "Is model.hf_endpoint (HF_ENDPOINT) the endpoint of a hub?")
    return ModelNotFound("hub_refused", what, "Look at model.id, model.revision and model.hf_endpoint (HF_ENDPOINT).")


def _maybe(place: Place) -> str:
    if place.is_withheld:
        return "the token was not sent over plain http, give HF_ENDPOINT as https"
    return f"may the token from {place.token_from} read it?" if place.token_from else "set HF_TOKEN"


def of_exception(error: Exception, place: Place, http: Any) -> VllmdError:
    """What an exception of huggingface_hub or of its HTTP library (`http`) means; `error` itself if it is one of ours."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, VllmdError):
        return error
    if isinstance(error, HfHubHTTPError):
        return of_answer(answer_of(error.response), place)
    if isinstance(error, HFValidationError):
        return ModelNotFound("hub_no_repository", f"{place.repository!r} is no name that a hub has: {place.clean(str(error))}", "Give model.id as ORG/NAME.")
    distrust = next((cause for cause in _causes(error) if isinstance(cause, ssl.SSLCertVerificationError)), None)
    if distrust is not None:
        return tls.refused(place.host, distrust)
    what = f"{place.url}: {place.clean(str(error) or type(error).__name__)}"
    if isinstance(error, http.TimeoutException):
        return SourceUnavailable("source_unreachable", f"{place.url}: {place.host} does not answer in time", _REACH)
    if isinstance(error, http.TooManyRedirects):
        return SourceUnavailable("redirect_loop", what, _PORTAL)
    if isinstance(error, http.ProxyError):
        return SourceUnavailable("proxy_refused", what, "Look at the proxy and its credentials, or name the host in no_proxy.")
    if isinstance(error, http.TransportError):
        return SourceUnavailable("source_unreachable", what, _REACH)
    if isinstance(error, http.InvalidURL):
        return ConfigError("hub_endpoint", what, "Look at model.hf_endpoint (HF_ENDPOINT) and at the proxy's settings.")
    return unreadable(place, f"{type(error).__name__} {place.clean(str(error))}")


def answer_of(response: Any) -> Answer:
    headers = response.headers
    message = headers.get("X-Error-Message") or ""
    url = str(response.url).partition("?")[0]
    return Answer(response.status_code, headers.get("X-Error-Code") or "", message, headers.get("Retry-After") or "", url)


def unreadable(place: Place, why: str) -> SourceUnavailable:
    return SourceUnavailable("source_unreadable", f"{place.url}: {place.host} does not answer with a listing of a hub: {why}", _PORTAL)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


_REACH = "Look at the network, the proxy's settings and model.hf_endpoint (HF_ENDPOINT)."
_PORTAL = "Is there a proxy or a sign-in page between? Is model.hf_endpoint (HF_ENDPOINT) the endpoint of a hub?"
