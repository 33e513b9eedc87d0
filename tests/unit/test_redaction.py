"""No secret of a command is shown, however it is passed and formed; what is no secret stays readable."""

from __future__ import annotations

import importlib.util
import random
import re
import string
import subprocess
import sys

import pytest

from hf_longctx.reporting.launch_command import launch_command
from hf_longctx.reporting.model_card import code_block
from hf_longctx.reporting.redaction import REDACTED, is_secret_name, redact, redact_text


HAS_LIBRARY = importlib.util.find_spec("detect_secrets") is not None
_LETTERS = string.ascii_letters + string.digits


def word(length: int, letters: str = _LETTERS, seed: int = 0) -> str:
    """A random word: no secret of anybody, and no form that a scanner of this repository would stop at."""
    return "".join(random.Random(seed).choices(letters, k=length))


HEX, UPPER = string.hexdigits[:16], string.ascii_uppercase + string.digits
VALUES = {
    "hugging face": "hf" + "_" + word(34),
    "openai": "sk" + "-proj-" + word(40),
    "anthropic": "sk" + "-ant-api03-" + word(40),
    "github": "gh" + "p_" + word(36),
    "github fine": "github" + "_pat_" + word(60),
    **{f"gitlab {kind}": f"gl{kind}-" + word(20) for kind in ("pat", "dt", "ft", "soat", "rt", "cbt", "ptt", "agent")},
    **{f"slack xox{kind}": f"xox{kind}-" + "123456789012-" + word(24) for kind in "abposrce"},
    "slack app": "xapp" + "-1-A0123-456-" + word(32, HEX),
    "slack hook": "T0123456/B0123456/" + word(24),
    **{f"aws {kind}": kind + word(16, UPPER) for kind in ("AKIA", "ASIA", "AROA", "ABIA")},
    "aws secret": word(38) + "/+",
    "aws secret of the manual": "wJalrXUtnFEMI" + "/K7MDENG/" + "bPxRfiCYEXAMPLEKEY",
    "google": "AI" + "za" + word(35),
    "google oauth": "ya29" + "." + word(40),
    "stripe": "sk" + "_live_" + word(24),
    "npm": "npm" + "_" + word(36),
    "pypi": "pypi" + "-AgEIcHlwaS5vcmc" + word(70),
    "docker": "dckr" + "_pat_" + word(27),
    "databricks": "dapi" + word(32, HEX),
    "digital ocean": "dop" + "_v1_" + word(64, HEX),
    "vault": "hvs" + "." + word(90),
    "sendgrid": "SG" + "." + word(22) + "." + word(43),
    "twilio": "SK" + word(32, HEX),
    "groq": "gsk" + "_" + word(52),
    "nvidia": "nvapi" + "-" + word(64),
    "replicate": "r8" + "_" + word(37),
    "telegram": "123456789:" + word(35),
    "mailchimp": word(32, HEX) + "-us12",
    "web token": "eyJ" + word(20) + "." + "eyJ" + word(30) + "." + word(43),
    "unknown issuer": word(48, seed=3),
    "private key": "-----BEGIN RSA PRIVATE" + " KEY-----\n" + word(64) + "\n-----END RSA PRIVATE" + " KEY-----",
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_known_value_is_hidden_wherever_it_stands(value):
    secret = value.removeprefix("T0123456/")
    parts = re.findall(r"[A-Za-z0-9]{12,}", secret)
    if secret != value:
        value = "https://hooks.slack.com/services/" + value
    for shown in (["--name", value], [f"--name={value}"], [f"note: {value}"], [value], [f'{{"a": "{value}"}}']):
        text = " ".join(redact(shown))
        assert secret not in text and REDACTED in text
        assert not any(part in text for part in parts)


SECRET = "abc" + "-123.x"
NAMES = """
--hub_token --hub-token --hub.token --hubToken --args.hub_token --token --auth_token --wandb_api_key --api-key --apikey
--pw --pwd --passwd --password --pass --passphrase --passcode --db-pass --ssh.passphrase --client_secret --secret
--credential --credentials --cookie --bearer --jwt --otp --sas --sas_token --sig --signature --pat --auth --private_key
--private-token --aws_secret_access_key
--aws-access-key-id --account_key --storage.account-key --signing_key --hf_token
-pw -token --pass-phrase --userpass --csrf_token
--AWS_SECRET_ACCESS_KEY --encryption_key --license_key --kaggle.key --connection_string --openai_key
""".split()


@pytest.mark.parametrize("name", NAMES)
def test_the_value_of_a_secret_flag_is_hidden_in_every_form(name):
    for value in (SECRET, f"--{SECRET}", "-x", "two words", "hunter2", "12345", ""):
        assert redact([name, value, "--seed", "1"]) == [name, REDACTED, "--seed", "1"]
        assert redact([f"{name}={value}", "--seed", "1"]) == [f"{name}={REDACTED}", "--seed", "1"]
    bare = name.lstrip("-")
    assert redact([f"{bare}={SECRET} and more"]) == [f"{bare}={REDACTED}"]
    assert redact([f"+{bare}={SECRET}"]) == [f"+{bare}={REDACTED}"]
    assert SECRET not in redact_text(f'--kwargs={{"a": {{"{bare}": "{SECRET} and more", "seed": 1}}}}')
    assert redact_text(f"{{'{bare}': '{SECRET} x', 'seed': 1}}") == f"{{'{bare}': '{REDACTED}', 'seed': 1}}"
    assert SECRET not in redact_text(f'"{{\\"{bare}\\": \\"{SECRET} x\\"}}"')
    assert redact_text(f"https://site/x?a=1&{bare}={SECRET}&b=2") == f"https://site/x?a=1&{bare}={REDACTED}&b=2"


def test_a_list_of_secrets_ends_at_the_next_flag_and_a_switch_has_no_value():
    assert redact(["--api_keys", "a", "b", "--seed", "1"]) == ["--api_keys", REDACTED, REDACTED, "--seed", "1"]
    assert redact(["--use_auth_token", "--seed", "1"]) == ["--use_auth_token", "--seed", "1"]
    assert redact(["--use_auth_token", "true", "x"]) == ["--use_auth_token", "true", "x"]
    assert redact(["--use_auth_token", SECRET]) == ["--use_auth_token", REDACTED]
    assert redact(["--auth", "Bearer", SECRET, "x"]) == ["--auth", "Bearer", REDACTED, "x"]
    assert redact(["--auth=basic", SECRET, "x"]) == ["--auth=basic", REDACTED, "x"]
    assert redact(["--password"]) == ["--password"] and redact([]) == []


@pytest.mark.parametrize("user", ["-u", "--user", "--proxy-user"])
def test_a_user_with_a_password_is_hidden(user):
    assert redact([user, "me:abc"]) == [user, REDACTED]
    assert redact([user, "me", "--pw", "abc"]) == [user, "me", "--pw", REDACTED]
    assert redact([f"{user}=me:abc"]) == [f"{user}={REDACTED}"] and redact([f"{user}=me"]) == [f"{user}=me"]


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer {}",
        "authorization: Basic {}",
        "Authorization: token {}",
        "Authorization: {}",
        "Bearer {}",
    ]
    + ["X-Api-Key: {}", "Private-Token: {}", "JOB-TOKEN: {}", "Cookie: session={}", "X-Amz-Security-Token: {}"]
    + [
        "Proxy-Authorization: Bearer {}",
        "Authorization=Bearer {}",
        "Bearer%20{}",
        "x-goog-api-key: {}",
        "api-key: {}",
    ],
)
def test_a_header_is_hidden_in_one_argument_and_in_several(header):
    secret = "Zm9v" + "YmFyLXF1eA"
    line = header.format(secret)
    for arguments in (
        ["-H", line],
        [f"--header={line}"],
        ["--header", *line.split()],
        [f'{{"h": "{line}"}}', "--seed"],
    ):
        shown = redact([*arguments, "--epochs", "3"])
        assert secret not in " ".join(shown) and shown[-2:] == ["--epochs", "3"]
    key, _, value = line.rpartition(": ")
    assert secret not in redact_text(f'{{"{key}": "{value}"}}')


def test_signed_addresses_keep_their_place():
    secret, day = word(43) + "%3D", "2026-01-02T03%3A04%3A05Z"
    azure = f"https://account.blob.core.windows.net/data/x.jsonl?sv=2022-11-02&se={day}&sr=b&sp=r&sig={secret}"
    assert redact(["--data", azure]) == ["--data", azure.replace(secret, REDACTED)]
    assert secret not in redact_text(f"SharedAccessSignature=sv=2022-11-02&sig={secret}")
    access, signature = "AKIA" + word(16, UPPER), word(64, HEX)
    s3 = f"https://b.s3.amazonaws.com/x?X-Amz-Credential={access}%2F20260102%2Fus-east-1&X-Amz-Expires=60"
    s3 += f"&X-Amz-Security-Token={secret}&X-Amz-Signature={signature}"
    shown = redact_text(s3)
    assert shown.startswith("https://b.s3.amazonaws.com/x?") and "X-Amz-Expires=60" in shown
    assert not any(part in shown for part in (access, signature, secret))
    old = f"https://b.s3.amazonaws.com/x?AWSAccessKeyId={access}&Expires=1&Signature={secret}"
    assert redact_text(old) == f"https://b.s3.amazonaws.com/x?AWSAccessKeyId={REDACTED}&Expires=1&Signature={REDACTED}"
    google = f"https://storage.googleapis.com/b/x?X-Goog-Algorithm=GOOG4&X-Goog-Signature={signature}"
    assert redact_text(google) == google.replace(signature, REDACTED)
    account = f"DefaultEndpointsProtocol=https;AccountName=me;AccountKey={word(86)}==;EndpointSuffix=core.windows.net"
    assert redact_text(account).replace(REDACTED, "") == re.sub("AccountKey=[^;]*", "AccountKey=", account)


@pytest.mark.parametrize("login", ["me:abc", ":abc", "me:a/b", "me:a@b", "me:12345", word(20), "oauth2:" + word(20)])
def test_a_login_in_an_address_is_hidden(login):
    assert redact_text(f"--url https://{login}@site.org/x") == f"--url https://{REDACTED}@site.org/x"


ORDINARY = """
recipes/sft.py --config recipes/sft_folder_of_documents.yaml --output_dir runs/hf_longctx/2026-01-02T03-04-05
recipes/sft.py --model_name_or_path meta-llama/Llama-3.1-8B-Instruct --model_revision
0123456789abcdef0123456789abcdef01234567
train.py --row_tokens 65536 --max_new_tokens 64 --num_token 5 --tokens_per_rank 8192 --tokenizer
Qwen/Qwen3-4B-Thinking-2507
train.py --eos_token </s> --pad_token=<pad> --tokenizer.bos_token <s> --image_token_id 5
--model.decoder_start_token 2
train.py --average_tokens_across_devices true --include_num_input_tokens_seen all --learning_rate 1e-5
--warmup_ratio=0.03
train.py --text_key text --label_key=label --sort_key length --dataset_key messages --token_file /run/token
--seed -1
train.py --dataset_name HuggingFaceFW/fineweb-edu --dataset_config sample-10BT --dataset_split train[:1%] --lr
-.5
train.py --data_files
hf://datasets/org/name@0123456789abcdef0123456789abcdef01234567/train-00000-of-00001.parquet
train.py --data s3://bucket/path/to/Data_2026/part-00001.parquet --master tcp://10.0.0.1:29500 --rdzv_endpoint
node1:29400
train.py --hash sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 --id
123e4567-e89b-12d3-a456-426614174000
train.py --fsdp_config
{"version":2,"reshard_after_forward":true,"transformer_layer_cls_to_wrap":["Qwen3NextDecoderLayer"]}
train.py --arch Qwen3NextForConditionalGenerationWithLongContext2 --sources
{"nli":"org/all-nli:pair","docs":"docstrings:torch"}
train.py --optim adamw_torch_fused --lr_scheduler_kwargs {"num_cycles":0.5} --use_auth_token --bf16 true
--report_to none
train.py model.layers=12 +trainer.max_steps=100 data.path=/mnt/Data/2026/Run1/Shard12/part.jsonl optimizer=adam
key=length
train.py --url https://huggingface.co/org/model/resolve/main/model.safetensors?download=true&x=1 --site
https://site:8443/x
train.py --prompt_template prompts/Answer.txt --author me --passes 3 --two_pass 1 --bypass_check --assign a:b
--signal 15
train.py --gpu_memory 80 --attn_implementation flash_attention_3 --lora_target_modules q_proj k_proj --sp 2
--passage_len 5
train.py --wandb_project long-context --run_name Qwen3-4B-LoRA-r16-alpha32-lr1e4-SeqLen131072-20260102
--push_to_hub false
git@github.com:org/name.git ssh://git@site.org/x 3.14 1e-8 0x7fff C:\\Users\\Me\\data.jsonl
/home/Me/Data/Run12/x.Y3/z_A4.bin
""".strip().splitlines()


@pytest.mark.parametrize("line", ORDINARY, ids=range(len(ORDINARY)))
def test_an_ordinary_command_stays_as_it_is(line):
    assert redact(line.split()) == line.split()


def test_hashes_and_class_names_are_no_random_words():
    for seed in range(200):
        for length in (32, 40, 64, 128):
            assert redact_text(f"--rev {word(length, HEX, seed)}") == f"--rev {word(length, HEX, seed)}"
    assert sum(redact([word(40, seed=seed)]) == [REDACTED] for seed in range(200)) > 180  # of an unknown issuer


def test_the_time_does_not_grow_with_the_square_of_the_line():
    """Each of these takes minutes where a pattern starts anew at every letter; nothing here is timed."""
    lines = {"x": 100_000, "a=b": 20_000, "://": 20_000, "a:": 30_000, 'token="': 10_000, "_": 50_000, "x-": 30_000}
    for part, number in {**lines, "a.key=": 9_000, "authorization: ": 8_000, "a=": 30_000}.items():
        assert redact([part * number])


def test_names_are_read_word_by_word():
    assert is_secret_name("AWSSecretAccessKey") and is_secret_name("_authToken") and is_secret_name("X-Amz-Credential")
    assert not any(map(is_secret_name, ("tokenizer", "tokens", "keyboard", "monkey", "path", "patience", "author")))


def test_back_ticks_do_not_close_the_fence():
    for ticks in ("", "`", "```", "``````"):
        command = launch_command(["train.py", "--note", f"a\n{ticks}\n# Not a heading\n"], {})
        first, *middle, last = code_block(command).split("\n")
        assert first == last + "bash" and set(last) == {"`"} and len(last) >= 3
        assert "\n".join(middle) == command and not any(line.strip().startswith(last) for line in middle)


SETTINGS_STAY = """
import sys
from detect_secrets.settings import get_settings
settings = get_settings()
settings.configure_plugins([{"name": "AWSKeyDetector"}])
settings.disable_filters("detect_secrets.filters.common.is_invalid_file")
before = settings.json(), dict(settings.filters), dict(settings.plugins)
from hf_longctx.reporting.redaction import redact_text
text = redact_text(sys.argv[1])
assert get_settings() is settings
assert (settings.json(), dict(settings.filters), dict(settings.plugins)) == before
print(text)
"""


@pytest.mark.skipif(not HAS_LIBRARY, reason="detect-secrets is not installed: its own patterns cannot be tried")
def test_what_the_library_knows_is_hidden_too_and_its_settings_stay():
    square = "sq0csp" + "-" + "a-" * 21 + "b"  # a form that has no pattern of ours
    command = [sys.executable, "-c", SETTINGS_STAY, f"--name {square}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == f"--name {REDACTED}", done.stderr


def test_without_the_library_nothing_of_it_is_needed():
    code = "import sys; sys.modules['detect_secrets'] = None\nfrom hf_longctx.reporting.redaction import redact_text\n"
    code += "print(redact_text('--hub.token abc x ' + 'gl' + 'pat-' + 20 * 'a'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"--hub.token abc x {REDACTED}", done.stderr  # a flag's value needs its arguments
