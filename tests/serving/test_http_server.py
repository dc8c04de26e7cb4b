"""Signals, reloads, keys, queues and disconnecting clients of a server process."""

from __future__ import annotations

import datetime
import errno
import io
import shutil
import signal
import socket
import ssl
import sys
import threading
from ipaddress import ip_address

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from server_process import ServerProcess

from lm.cli import main
from lm.errors import UserError
from lm.serving.app import ServerOptions, log_note
from lm.serving.http_server import ListenOptions, serve
from lm.serving.sampling_parameters import RequestLimits

LONG = {"prompt": "the big", "max_tokens": 200, "ignore_eos": True, "seed": 7}
LIMITS = ServerOptions(RequestLimits(9, 9, 9))
SHORT = LONG | {"max_tokens": 1}


@pytest.fixture(scope="module")
def changing(tiny_run, tmp_path_factory):
    """Server of a copy of the run, with keys and TLS, which tests change in their order."""
    folder = tmp_path_factory.mktemp("changing")
    shutil.copytree(tiny_run, folder / "run")
    shutil.copy(tiny_run.parent / "config.py", folder)
    (folder / "keys").write_text("# ours\nsesame\n")
    (folder / "certificate").write_text(certificate())
    keys = ["--api_keys", str(folder / "keys"), "--ssl_certfile", str(folder / "certificate")]
    sizes = ["--rows", "2", "--queue", "62"]
    found = ServerProcess(folder / "log", "--workdir", str(folder / "run"), *keys, *sizes)
    yield found, folder
    found.process.kill()


def certificate():
    """A private key and its certificate of 127.0.0.1, as PEM."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lm")])
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    day = datetime.timedelta(days=1)
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    signed = built.add_extension(addresses, critical=False).sign(key, hashes.SHA256())
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private = key.private_bytes(encoding, form, serialization.NoEncryption())
    return (private + signed.public_bytes(encoding)).decode()


def trusted(server):
    return ssl.create_default_context(cafile=str(server.log.parent / "certificate"))


def get(server, path):
    return httpx.get(f"{server.url}/{path}", verify=trusted(server))


def post(server, body, key="sesame"):
    headers = {"Authorization": f"Bearer {key}"}
    options = {"headers": headers, "timeout": 180, "verify": trusted(server)}
    return httpx.post(f"{server.url}/v1/completions", json=body, **options)


def post_all(server, bodies):
    """The responses to requests that are sent at once, and the threads that wait for them."""
    found = {}
    threads = [
        threading.Thread(target=lambda i=i, body=body: found.update({i: post(server, body)}))
        for i, body in enumerate(bodies)
    ]
    for thread in threads:
        thread.start()
    return found, threads


def n_running(server):
    lines = get(server, "metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("lm_running{"))


def test_keys_are_read_again_when_they_change(changing):
    server, folder = changing
    assert post(server, SHORT, key="guess").status_code == 401
    assert get(server, "v1/models").status_code == 401
    with pytest.raises(httpx.ConnectError, match="self-signed"):
        httpx.get(f"{server.url}/healthz")
    assert post(server, SHORT).status_code == 200
    (folder / "keys").write_text("")
    assert post(server, SHORT).status_code == 200
    server.wait_for("the keys stay as they were")
    (folder / "keys").write_text("sesame\nother\n")
    assert post(server, SHORT, key="other").status_code == 200


@pytest.mark.parametrize("stream", ["true", "false"])
def test_disconnect_cancels_the_request(changing, stream):
    server, _ = changing
    n_before = server.text().count('"status": 499')
    address = httpx.URL(server.url)
    with (
        socket.create_connection((address.host, address.port)) as plain,
        trusted(server).wrap_socket(plain, server_hostname=address.host) as client,
    ):
        body = b'{"prompt": "the", "max_tokens": 240, "ignore_eos": true, "n": 60, "stream": %s}'
        body %= stream.encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Authorization: Bearer sesame\r\n\r\n" + body)
        server.wait(lambda: n_running(server) > 0)
    server.wait(lambda: server.text().count('"status": 499') == n_before + 1)
    server.wait(lambda: n_running(server) == 0)


def test_request_beyond_the_queue_is_rejected(changing):
    server, _ = changing
    many = LONG | {"n": 30, "max_tokens": 60}  # of which 64 wait or run
    alone = post(server, many).json()["choices"]
    found, threads = post_all(server, [many] * 6)
    for thread in threads:
        thread.join()
    refused = [response for response in found.values() if response.status_code == 429]
    served = [response for response in found.values() if response.status_code == 200]
    assert len(refused) >= 2
    assert len(served) >= 2
    assert len(refused) + len(served) == 6
    assert all(response.headers["Retry-After"] == "1" for response in refused)
    assert all(response.json()["choices"] == alone for response in served)  # a seed: alike


def test_newer_checkpoint_is_served_and_a_damaged_one_is_not(changing, one_device):
    server, folder = changing
    words = ["--config", str(folder / "config.py"), "--workdir", str(folder / "run")]
    greedy = SHORT | {"logprobs": 0, "temperature": 0}
    before = post(server, greedy).json()
    assert main(["train", *words, "--change", "--config.train.steps=3"]) == 0
    newest = folder / "run" / "checkpoints" / "3" / "state"
    whole = {file: file.read_bytes() for file in newest.rglob("*") if file.is_file()}
    for file, content in whole.items():
        file.write_bytes(content[: len(content) // 2])
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("still serving step 2")
    assert post(server, greedy).json()["choices"] == before["choices"]
    for file, content in whole.items():
        file.write_bytes(content)
    _, threads = post_all(server, [LONG])
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("serving step 3")
    after = post(server, greedy).json()
    assert after["system_fingerprint"] == "step-3"
    assert after["choices"] != before["choices"]
    threads[0].join()


def test_sigterm_loses_no_request(changing):
    server, _ = changing
    found, threads = post_all(server, [LONG | {"n": 60}])
    server.wait(lambda: n_running(server) == 2)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("shutting down")
    refused = post(server, SHORT)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert get(server, "readyz").status_code == 503
    assert server.process.wait(timeout=180) == 0, server.text()
    threads[0].join()
    assert found[0].status_code == 200
    assert found[0].json()["usage"]["completion_tokens"] == 60 * 200


def test_signals_before_the_models_are_loaded_end_nothing(tiny_run):
    """A look for a newer checkpoint is due only once there is one."""
    seen = []
    before = signal.signal(signal.SIGHUP, lambda *args: seen.append(args))

    def load():
        signal.raise_signal(signal.SIGHUP)
        raise UserError("loaded")

    with pytest.raises(UserError, match="loaded"):
        serve(load, LIMITS, ListenOptions("127.0.0.1", 0))
    assert main(["serve", "--workdir", str(tiny_run), "--ssl_keyfile", "x"]) == 2
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
    assert not seen


def test_log_on_a_full_disk_ends_nothing(monkeypatch):
    def load():
        log_note("a line")
        raise UserError("loaded")

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "no space")

        def flush(self):
            self.write("")

    monkeypatch.setattr(sys, "stderr", Full())
    with pytest.raises(UserError, match="loaded"):
        serve(load, LIMITS, ListenOptions("127.0.0.1", 0))


def test_unservable_run_is_a_one_line_error(tiny_run, tmp_path, capsys, monkeypatch):
    run = str(tiny_run)
    (tmp_path / "keys").write_text("# none\n")
    (tmp_path / "certificate").write_text("none\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            "in use": ["--workdir", run, "--port", port],
            "largest": ["--workdir", run, "--port", "99999"],
            "nowhere.invalid": ["--workdir", run, "--host", "nowhere.invalid"],
            "no key": ["--workdir", run, "--api_keys", str(tmp_path / "keys")],
            "No such file": ["--workdir", run, "--api_keys", str(tmp_path / "missing")],
            str(tmp_path): ["--workdir", run, "--api_keys", str(tmp_path)],
            "no usable certificate": [
                *["--workdir", run, "--port", "0"],
                *["--ssl_certfile", str(tmp_path / "certificate")],
            ],
            "needs --ssl_certfile": ["--workdir", run, "--ssl_keyfile", "x"],
            "needs a unique name": ["--workdir", run, "--workdir", f"run={tmp_path}/run"],
            "no run": ["--workdir", str(tmp_path)],
        }
        for said, words in cases.items():
            assert main(["serve", *words]) == 2
            line = capsys.readouterr().err
            assert said in line, line
            assert "Traceback" not in line
    for name in [name for name in sys.modules if name.startswith("lm.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.requests", None)
    assert main(["serve", "--workdir", run]) == 2
    assert "[serve]" in capsys.readouterr().err
