"""From settings and environment to a client of the store: endpoint, region, credentials by botocore's usual chain.

botocore reads the process's own environment (AWS_*, HOME, *_proxy), which is the one that the resolver's child was given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllmd.config.settings import Model
from vllmd.errors import ConfigError, PermissionMissing, VllmdError
from vllmd.models.sources import s3_errors
from vllmd.models.sources.endpoint import parsed
from vllmd.models.sources.s3_errors import ANONYMOUS, ENVIRONMENT, Place
from vllmd.models.sources.s3_http import CONNECT_S, READ_S, Sender
from vllmd.system.files import read_small

CREDENTIAL = "s3-credentials"
"""A systemd credential in the format of ~/.aws/credentials, in whose place it stands."""
ATTEMPTS = 2
"""Of one request; the resolve stage itself asks again, with longer pauses."""
_SYSTEMD = f"the systemd credential {CREDENTIAL}"
_KINDS = {
    "env": ENVIRONMENT,
    "shared-credentials-file": "the shared credentials file",
    "config-file": "the AWS config file",
    "assume-role": "an assumed role",
    "assume-role-with-web-identity": "a web identity",
    "custom-process": "credential_process",
    "container-role": "the container's role",
    "iam-role": "the instance's role",
    "sso": "SSO",
}


@dataclass(frozen=True, slots=True)
class Store:
    """`credentials` are botocore's (they renew themselves), None for an anonymous reader."""

    client: Any
    credentials: Any = field(repr=False)
    sender: Sender
    place: Place

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No connection stays open behind it: what comes next may take hours."""
        try:
            yield
        finally:
            self.sender.close()


def opened(settings: Model, prefix: str, environ: Mapping[str, str]) -> Store:
    """ConfigError, PermissionMissing where the settings or the credentials are no good; SourceUnavailable where they could not
    be fetched. Nothing of the bucket is asked yet."""
    endpoint = endpoint_url(settings.r2_endpoint_url)
    place = Place(settings.r2_bucket, prefix, endpoint or "the store", ANONYMOUS)
    with translated(place):
        session = _session(environ)
        credentials = session.get_credentials()
        frozen = credentials.get_frozen_credentials() if credentials else None
        region = settings.r2_region or _region(session, environ, endpoint)
        client = session.create_client("s3", region_name=region, endpoint_url=endpoint or None, config=_config(frozen))
    secrets = tuple(secret for secret in (frozen.secret_key, frozen.token) if secret) if frozen else ()
    kind = _kind(credentials, session, environ) if frozen else ANONYMOUS
    place = Place(settings.r2_bucket, prefix, client.meta.endpoint_url, kind, secrets)
    sender = Sender(client.meta.endpoint_url, _ca_bundle(session), place)
    client.meta.events.register("before-send.s3", sender)
    return Store(client, credentials if frozen else None, sender, place)


@contextmanager
def translated(place: Place) -> Iterator[None]:
    """What botocore raises, as errors of ours."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except VllmdError:
        raise
    except (BotoCoreError, ClientError) as error:
        raise s3_errors.of_exception(error, place) from error
    except ValueError as error:
        raise ConfigError("s3_settings", f"{place.origin}: {place.clean(str(error))}", "Look at model.r2_* and at AWS_ENDPOINT_URL.") from error


def endpoint_url(text: str) -> str:
    """The endpoint as a URL, https where nothing is said. ConfigError, which does not show it: it may hold a password."""
    url = parsed(text)
    if url is None:
        hint = "As https://HOST or https://HOST:PORT, without user, password, bucket or query; credentials have their own places."
        raise ConfigError("s3_endpoint", "model.r2_endpoint_url (R2_ENDPOINT_URL) is no endpoint of a store", hint)
    return url


def _session(environ: Mapping[str, str]) -> Any:
    from botocore.session import Session

    session = Session()
    given = _systemd_file(environ)
    if given is not None:
        session.set_config_variable("credentials_file", str(given))
    if not (environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _is_ec2()):
        # Elsewhere nobody answers at 169.254.169.254, which takes seconds to find out.
        session.get_component("credential_provider").remove("iam-role")
    return session


def _systemd_file(environ: Mapping[str, str]) -> Path | None:
    """The systemd credential, unless the environment names another file."""
    directory = environ.get("CREDENTIALS_DIRECTORY", "")
    path = Path(directory, CREDENTIAL)
    if not directory or environ.get("AWS_SHARED_CREDENTIALS_FILE") or not path.is_file():
        return None
    if not os.access(path, os.R_OK):
        raise PermissionMissing("s3_credentials", f"{path} cannot be read", "Is LoadCredential= of the unit as it was shipped?")
    return path


def _is_ec2() -> bool:
    for name in ("sys_vendor", "bios_version"):
        try:
            if b"amazon" in read_small(Path("/sys/class/dmi/id", name), 200).lower():
                return True
        except OSError:
            continue
    return False


def _region(session: Any, environ: Mapping[str, str], endpoint: str) -> str:
    """As the AWS tools find it; else what every store but AWS takes, or where AWS tells the right one."""
    named = environ.get("AWS_REGION") or session.get_config_variable("region")
    if named:
        return str(named)
    is_custom = endpoint or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or "endpoint_url" in session.get_scoped_config()
    return "auto" if is_custom else "us-east-1"


def _ca_bundle(session: Any) -> str | bool:
    """Whose certificates are trusted: a file, or True for the usual ones."""
    path = session.get_config_variable("ca_bundle")
    if path and not os.access(path, os.R_OK):
        raise ConfigError("s3_settings", f"{path}, which AWS_CA_BUNDLE or ca_bundle names, cannot be read", "Correct it, or unset it.")
    return str(path) if path else True


def _config(frozen: Any) -> Any:
    from botocore import UNSIGNED
    from botocore.config import Config

    return Config(
        signature_version="s3v4" if frozen else UNSIGNED,
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
    )


def _kind(credentials: Any, session: Any, environ: Mapping[str, str]) -> str:
    kind = _KINDS.get(credentials.method, credentials.method)
    if credentials.method == "shared-credentials-file" and _systemd_file(environ) is not None:
        kind = _SYSTEMD
    profile = session.profile
    return f"{kind}, profile {profile}" if profile and credentials.method != "env" else kind
