"""A store of objects as fast as this machine can give them: nginx for the bytes, a few lines of Python for the listing.

Speaks what readers of a bucket ask for: ListObjectsV2, HeadObject, GetObject with ranges and If-Match, by path. Signatures are
not looked at. The same files are there as a model of a hub (/api/models/..., /ORG/NAME/resolve/...). Over HTTP and TLS.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

from bench.place import BenchError, free_port, wait_for

BUCKET = "bench"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_CONFIG = """
daemon off;
worker_processes auto;
pid {home}/pid;
error_log {home}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path {home}/1;
    proxy_temp_path {home}/2;
    fastcgi_temp_path {home}/3;
    uwsgi_temp_path {home}/4;
    scgi_temp_path {home}/5;
    ssl_certificate {home}/cert.pem;
    ssl_certificate_key {home}/key.pem;
    ssl_session_cache shared:S:1m;
    ssl_protocols TLSv1.2 TLSv1.3;
    server {{
        listen 127.0.0.1:{port} reuseport;
        listen 127.0.0.1:{tls_port} ssl reuseport;
        root {root};
        location = /{bucket} {{ proxy_pass http://127.0.0.1:{lister}; }}
        location = /{bucket}/ {{ proxy_pass http://127.0.0.1:{lister}; }}
        location /api/ {{ proxy_pass http://127.0.0.1:{lister}; }}
        location ~ ^/bench/model/resolve/[^/]+/(.*)$ {{ alias {root}/{bucket}/model/$1; add_header X-Repo-Commit {commit}; }}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Server:
    """`url` and `tls_url` are its endpoints; `ca` is who vouches for the second."""

    url: str
    tls_url: str
    ca: Path


@contextlib.contextmanager
def serving(nginx: Path, root: Path, home: Path) -> Iterator[Server]:
    """root/BUCKET/... as a store, until the end of the block; `home` is for what nginx writes. BenchError."""
    home.mkdir()
    certificate(home)
    port, tls_port = free_port(), free_port()
    with listing(root) as lister:
        words = {"home": home, "root": root, "bucket": BUCKET, "commit": COMMIT, "port": port, "tls_port": tls_port, "lister": lister}
        (home / "nginx.conf").write_text(_CONFIG.format(**words))
        argv = [str(nginx), "-p", str(home), "-e", str(home / "error.log"), "-c", str(home / "nginx.conf")]
        if os.geteuid() == 0:  # its workers, too: the files are ours alone
            argv += ["-g", "user root;"]
        with subprocess.Popen(argv) as process:
            try:
                wait_for("nginx", lambda: (home / "pid").exists() and (home / "pid").read_text().strip(), 10, lambda: process.poll() is not None)
                yield Server(f"http://127.0.0.1:{port}", f"https://127.0.0.1:{tls_port}", home / "ca.pem")
            except BenchError as error:
                raise BenchError(f"{error}: {(home / 'error.log').read_text(errors='replace')[-1000:]}") from error
            finally:
                process.terminate()


@contextlib.contextmanager
def listing(root: Path) -> Iterator[int]:
    """The port of a server that lists root/BUCKET, and describes it as a model of a hub."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            data, kind = _hub(root, url.path) if url.path.startswith("/api/") else _bucket(root, parse_qs(url.query, keep_blank_values=True))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _bucket(root: Path, query: dict[str, list[str]]) -> tuple[bytes, str]:
    if "location" in query:
        return b'<LocationConstraint xmlns="http://s3.amazonaws.com/doc/2006-03-01/">us-east-1</LocationConstraint>', "application/xml"
    prefix = query.get("prefix", [""])[0]
    rows = []
    for path in sorted(path for path in (root / BUCKET).rglob("*") if path.is_file()):
        key, status = str(path.relative_to(root / BUCKET)), path.stat()
        if key.startswith(prefix):
            modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
            tag = f"&quot;{int(status.st_mtime):x}-{status.st_size:x}&quot;"  # as nginx makes it
            rows.append(f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified><ETag>{tag}</ETag><Size>{status.st_size}</Size></Contents>")
    head = f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>"
    body = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{head}{"".join(rows)}</ListBucketResult>'
    return f'<?xml version="1.0" encoding="UTF-8"?>{body}'.encode(), "application/xml"


def _hub(root: Path, path: str) -> tuple[bytes, str]:
    """The model's description, or its tree."""
    files = sorted((root / BUCKET / "model").iterdir())
    tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT} for file in files]
    about = {"_id": "0", "id": "bench/model", "modelId": "bench/model", "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
    about["siblings"] = [{"rfilename": file.name} for file in files]
    return json.dumps(tree if "/tree/" in path else about).encode(), "application/json"


def certificate(directory: Path) -> None:
    """ca.pem, and cert.pem and key.pem of 127.0.0.1 for which it vouches, for a day."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now, day, pem = datetime.datetime.now(datetime.UTC), datetime.timedelta(1), serialization.Encoding.PEM
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def made(name: str, whose: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> bytes:
        issuer, subject = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in ("bench authority", name))
        builder = x509.CertificateBuilder(issuer, subject, whose.public_key(), x509.random_serial_number(), now - day, now + day)
        return builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints)).sign(authority, hashes.SHA256()).public_bytes(pem)

    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    (directory / "ca.pem").write_bytes(made("bench authority", authority, x509.BasicConstraints(ca=True, path_length=None)))
    (directory / "cert.pem").write_bytes(made("bench server", key, address))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "key.pem").write_bytes(private)
