"""Secrets in the forms that occur in commands, diffs, configurations and the environment."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

SECRET = "Zq7vXw2LmN9pRt4KdYb3"
"""Part of every secret; no file of a run may contain it."""

_PEM = "-----BEGIN {0}-----\\nMIIEvQIBADANBgkqh" + SECRET + "\\nabcdefgh\\n-----END {0}-----"
FORMS: dict[str, str] = {
    # Addresses
    "user and password": f"https://me:{SECRET}@host:5000/path",
    "a password with a slash": f"https://me:a/{SECRET}@host/path",
    "a password with an at sign": f"postgresql://me:p@{SECRET}@db/mlflow",
    "a token as user": f"https://{SECRET}@host/repo.git",
    "a query": f"https://host/?a=1&token={SECRET}&b=2",
    "a signed address": f"https://bucket/file?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}",
    "a SAS address": f"https://store/box?sv=2020&sig={SECRET}&se=9",
    "an address in JSON": json.dumps({"uri": f"http://me:{SECRET}@host"}),
    # Commands
    "an option": f"tool --token {SECRET} run",
    "an option with =": f"tool --api-key={SECRET}",
    "a variable before a command": f"DB_PASS={SECRET} tool",
    "a variable named _PWD": f"export SMTP_PWD={SECRET}",
    "a variable named _KEY": f"SIGNING_KEY={SECRET} make",
    "curl's user": f"curl -u me:{SECRET} host",
    "a header": f"curl -H 'Authorization: Bearer {SECRET}'",
    "a header of its own": f"curl -H 'X-Api-Key: {SECRET}'",
    "basic": f"Authorization: Basic {base64.b64encode(SECRET.encode()).decode()}{SECRET}",
    "netrc": f"machine host login me password {SECRET}",
    # Code, JSON, YAML and INI
    "a Python string": f"+password = '{SECRET}'",
    "a triple-quoted string": f'+token = """first\n{SECRET}\n"""',
    "another triple-quoted string": f"+secret = '''\n{SECRET}\n'''",
    "a string with escapes": f'+password = "a\\"{SECRET}"',
    "a dictionary": f'{{"db_password": "{SECRET}"}}',
    "JSON within JSON": json.dumps({"diff": json.dumps({"password": SECRET})}),
    "YAML": f"  client_secret: {SECRET}",
    "INI": f"aws_secret_access_key = {SECRET}/abc+def",
    "an account key": f"AccountName=me;AccountKey={SECRET}==;EndpointSuffix=core",
    "a shared access key": f"Endpoint=sb://x/;SharedAccessKey={SECRET}=",
    "a passphrase": f"passphrase: '{SECRET}'",
    "credentials": f"credentials = {SECRET}",
    "an arrow": f":password => '{SECRET}'",
    "a walrus": f"(token := '{SECRET}')",
    # Keys that are known by their form
    "AWS": f"x = AKIA{SECRET.upper()[:16]}  # {'AKIA' + SECRET.upper()[:16]}",
    "AWS for a while": f"ASIA{SECRET.upper()}",
    "GitHub": f"ghp_{SECRET}{SECRET}",
    "GitHub, fine": f"github_pat_{SECRET}{SECRET}",
    "GitLab": f"glpat-{SECRET}",
    "Hugging Face": f"hf_{SECRET}",
    "Slack": f"xoxb-1234-{SECRET}",
    "Slack's hook": f"https://hooks.slack.com/services/T0/B0/{SECRET}",
    "OpenAI": f"sk-{SECRET}",
    "OpenAI's project": f"sk-proj-{SECRET}",
    "Stripe": f"sk_live_{SECRET}",
    "Google": f"AIza{SECRET}{SECRET}",
    "Google's token": f"ya29.{SECRET}",
    "a JWT": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIx{SECRET}.{SECRET}",
    "npm": f"npm_{SECRET}{SECRET}",
    "PyPI": f"pypi-{SECRET}{SECRET}",
    "a private key": _PEM.format("RSA PRIVATE KEY").replace("\\n", "\n"),
    "a private key in one line": json.dumps(_PEM.format("PRIVATE KEY").replace("\\n", "\n")),
    "a PGP key": _PEM.format("PGP PRIVATE KEY BLOCK").replace("\\n", "\n"),
    "a key cut short": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n",
    # Values of the environment, wherever they stand
    "a password of the environment": f"open('{SECRET}-1')",
    "a key of the environment": f"--x={SECRET}-2",
    "a token in an address of the environment": f"echo {SECRET}-3",
    "a quoted value of the environment": f"https://host/{SECRET}%2F4",
}


def environment() -> dict[str, str]:
    """Environment variables with secrets, one for each kind of name."""
    return {
        "MY_DB_PASS": f"{SECRET}-1",
        "DEPLOY_KEY": f"{SECRET}-2",
        "DATABASE_URL": f"postgres://me:{SECRET}-3@db/x",
        "SERVICE_TOKEN": f"{SECRET}/4",
        "ROOT_PWD": f"{SECRET}-5",
        "AWS_SECRET_ACCESS_KEY": f"{SECRET}-6",
        "APP_SECRET": f"{SECRET}-7",
        "GOOGLE_CREDENTIALS": f"{SECRET}-8",
    }


def in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def holders_of_secrets(folder: Path) -> list[Path]:
    """Return the files below a folder that contain ``SECRET`` in upper or lower case."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if SECRET.lower().encode() in path.read_bytes().lower()]
