"""Certificates for a test, made by the `openssl` program."""

import subprocess
from pathlib import Path

from tests.system.test_fan_out import need

EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
USES = "keyUsage=critical,digitalSignature,keyCertSign"


class Authority:
    """Signs certificates; its own is `certificate`."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._openssl = need("openssl")
        self._directory = directory
        self.certificate, self._key = self._files(name)
        self._run("req", "-x509", *EC, "-keyout", self._key, "-out", self.certificate, *_subject(name), "-addext", USES)

    def sign(self, name: str, *, days: int = 30, hosts: str = "DNS:localhost,IP:127.0.0.1") -> tuple[Path, Path]:
        """The files of a certificate with that common name, and of its key."""
        certificate, key = self._files(name)
        request, extensions = certificate.with_suffix(".csr"), certificate.with_suffix(".ext")
        extensions.write_text(f"subjectAltName = {hosts}\nkeyUsage = digitalSignature\n")
        self._run("req", "-new", *EC, "-keyout", key, "-out", request, *_subject(name))
        signed_by = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial", "-days", str(days))
        self._run("x509", "-req", "-in", request, "-out", certificate, *signed_by, "-extfile", extensions)
        return certificate, key

    def _files(self, name: str) -> tuple[Path, Path]:
        return self._directory / f"{name}.pem", self._directory / f"{name}.key"

    def _run(self, *arguments: str | Path) -> None:
        subprocess.run([self._openssl, *arguments], check=True, capture_output=True)


def _subject(name: str) -> tuple[str, str]:
    return "-subj", f"/O=Lab/CN={name}"
