"""docs/guides/behind-nginx.md, word for word: Debian's nginx with TLS before two instances, on a host without a network."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.system.extras import extra_packages
from tests.system.guides import blocks, followed
from tests.system.host import Host

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

GUIDE, WANTED = "behind-nginx.md", ("ca-certificates", "curl", "nginx", "openssl")
ARCHIVE, SOURCE = "/root/archive", "/etc/apt/sources.list.d/test.list"
TIMES = """
import http.client, json, socket, ssl, sys, time
link = http.client.HTTPConnection("localhost")
link.sock = ssl.create_default_context(cafile="/etc/ssl/llm.pem").wrap_socket(socket.create_connection(("127.0.0.1", 443), 20), server_hostname="localhost")
body = {"model": "chat", "prompt": "x", "max_tokens": 20, "stream": True}
link.request("POST", "/chat/v1/completions", json.dumps(body), {"Authorization": "Bearer " + sys.argv[1], "Content-Type": "application/json"})
answer = link.getresponse()
print(*[time.monotonic() for line in answer if line.startswith(b"data:")])
"""


def archive(host: Host) -> None:
    """What apt finds: packages of Debian in a directory, with their list."""
    folder = host.container.path(ARCHIVE)
    folder.mkdir()
    entries = []
    for deb in sorted(extra_packages(WANTED).glob("*.deb")):
        shutil.copy(deb, folder)
        fields = subprocess.run(["dpkg-deb", "--field", deb], capture_output=True, text=True, check=True).stdout
        entries.append(f"{fields.rstrip()}\nFilename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {hashlib.sha256(deb.read_bytes()).hexdigest()}\n")
    (folder / "Packages").write_text("\n".join(entries))
    host.container.write(SOURCE, f"deb [trusted=yes] file:{ARCHIVE} ./\n")
    host.shell(f"apt-get -qq update -o Dir::Etc::sourcelist={SOURCE} -o Dir::Etc::sourceparts=-")


@pytest.fixture
def served(host: Host) -> Iterator[Host]:
    archive(host)
    for name, port in (("chat", 8000), ("draft", 8001)):
        host.instance(name, env={"FAKE_TOKEN_S": "0.05"}, serve={"port": port, "served_model_name": name})
        host.start(name)
    yield host
    host.shell(f"systemctl stop nginx || :; apt-get -qq -y purge nginx nginx-common curl; apt-get -qq -y autoremove --purge; rm -rf {ARCHIVE} {SOURCE} /etc/nginx /etc/ssl/llm.pem /etc/ssl/private/llm.key", timeout_s=120)


def test_behind_nginx_tokens_stream_and_nothing_but_the_api_is_open(served: Host) -> None:
    host = served
    *prepared, stream, health = blocks(GUIDE)
    followed(host, prepared)
    assert followed(host, [stream]).count("data: ") > 30
    followed(host, [health])
    key = host.run("vllmctl", "api-key", "show", "chat").out.strip()
    came = [float(word) for word in host.run("python3", "-c", TIMES, key).out.split()]
    assert came[-1] - came[0] > 0.5, "20 tokens of 0.05 s each: not all at once"

    def status(path: str, *words: str) -> str:
        return host.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", "/etc/ssl/llm.pem", *words, f"https://localhost{path}", check=False).out

    with_key = ("-H", f"Authorization: Bearer {key}")
    assert status("/chat/v1/models") == "401"
    assert status("/chat/v1/models", *with_key) == "200"
    assert status("/draft/v1/models", *with_key) == "401", "each has keys of its own"
    for path in ("/metrics", "/chat/metrics", "/chat/tokenize", "/chat/v1/../metrics", "/chat/v1/%2e%2e/metrics", "/chat/v1//../../metrics"):
        assert status(path, "--path-as-is", *with_key) in ("400", "404"), path
    host.stop("chat")
    assert status("/chat/health") == "502"
    assert status("/draft/health") == "200"
