"""The names by which the other rooms use a run's files; what they are is said in the files they come from."""

from modhifi_cli.files.disk import (
    FORMAT_VERSION,
    make_folder,
    read_object,
    read_text,
    write_bytes,
    write_json,
    write_text,
)
from modhifi_cli.files.earlier_run import opening_of, reads_text, with_weights
from modhifi_cli.files.edits import load_edits
from modhifi_cli.files.manifest import NAME as CHECKSUMS
from modhifi_cli.files.manifest import checked, made_here, renew
from modhifi_cli.files.results import (
    environment,
    load_latency_table,
    measurements_to_json,
    read_results,
    report_material,
    save_latency_table,
    text_of,
)
from modhifi_cli.files.run_folder import RunDirectory, run_folder
from modhifi_cli.files.run_names import INCOMPLETE
from modhifi_cli.files.saved_network import (
    answer,
    answer_process,
    answers_of,
    code_changed,
    license_of,
    load_model,
    load_saved,
    opens_natively,
    read_answer,
    save_model,
    save_verification,
    stored_answers,
)

__all__ = [
    "CHECKSUMS", "FORMAT_VERSION", "INCOMPLETE", "RunDirectory", "answer", "answer_process", "answers_of", "checked", "code_changed",
    "environment", "license_of", "load_edits", "load_latency_table", "load_model", "load_saved", "made_here", "make_folder",
    "measurements_to_json", "opening_of", "opens_natively", "read_answer", "read_object", "read_results", "read_text", "reads_text", "renew",
    "report_material", "run_folder", "save_latency_table", "save_model", "save_verification", "stored_answers", "text_of", "with_weights", "write_bytes",
    "write_json", "write_text",
]  # fmt: skip
