"""What is in a run folder: every file, and every column of those that have any. A test runs one and compares."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, NamedTuple

from lamina.explain.words import fields, paragraphs


class File(NamedTuple):
    name: str  # in the run folder; * stands for a number or a name
    about: str
    columns: Mapping[str, str] = {}  # of a row, or dotted keys of a document; * stands for any key

    @property
    def facts(self) -> dict[str, Any]:
        return {"file": self.name, "about": self.about, "columns": dict(self.columns)}


FILES = (
    File(
        "config.toml",
        "Every key of the config, with where its value came from as a comment. `lamina run config.toml` runs it again; "
        "the same bits come out. There is none for a run that was made in Python from parts that have no names.",
    ),
    File(
        "metrics.jsonl",
        "A row per round. Rounds count from 0.",
        {
            "round": "from 0",
            "in_sync": "no layer waits: the model that is tested is what all clients would continue with",
            "accuracy": "of the global model on the test set; null where it was not tested",
            "loss": "the same model's mean loss on the test set",
            "personal_accuracy": "mean over the clients' own models on their own test sets",
            "accuracy_before": "mean over the clients' models before aggregation (accuracy_before=true)",
            "metrics": "by name; of each label where there is one per label (per_class/3); null where it is undefined: "
            "for a class without a test example, or where only one class is there",
            "train_loss": "mean training loss of the accepted clients",
            "lr": "learning rate of the round",
            "clients": "in the cohort",
            "refused": "whose message was not used: events.jsonl says why",
            "uploaded": "parameters (tensors) of which updates were sent",
            "parameters": "parameters (tensors) there are",
            "bytes_up": "of this round, all clients, headers included",
            "bytes_down": "the same, down",
            "total_up": "bytes_up since the start of the run",
            "total_down": "bytes_down since the start of the run",
            "fedavg_up": "what FedAvg with fp32 would have sent until here",
            "fedavg_down": "the same, down",
            "seconds": "that the round took, its test included",
            "network_seconds": "since the start of the run, on the virtual network; null without one",
            "epsilon": "that all rounds until here have cost, at privacy.delta; null without privacy, and where a "
            "round was made without it",
        },
    ),
    File(
        "layers.jsonl",
        "A row per round and trainable parameter (a tensor). E is the weighted mean over the accepted messages, u the "
        "update as the server decoded it, m their number. What does not apply is left out.",
        {
            "round": "from 0",
            "layer": "name of the parameter",
            "uploaded": "whether its update was sent in this round",
            "interval": "rounds between two aggregations, as the method has it",
            "bytes_up": "of this layer, all clients",
            "bytes_down": "the same, down",
            "update_norm": "|Eu|, length of the mean update",
            "divergence": "sqrt(E|u-Eu|^2 / |Eu|^2): how far clients disagree, relative to what they agree on",
            "divergence_std": "sqrt(m E|u-Eu|^2 / (m numel - 1)): the same as a deviation per entry",
            "alignment": "|Eu|^2 / E|u|^2: 1 where all clients sent the same, near 1/m where they share nothing",
            "discrepancy": "E|u-Eu|^2 per entry and local step since the layer's last aggregation (FedLAMA's d)",
            "inertia": "|w(t) - w(2)| / |w(2)| of the global model, from round 2 on (LIPS)",
            "inertia_l2": "|w(t) - w(2)|",
            "inertia_cosine": "w(t) . w(2) / (|w(t)| |w(2)|)",
            "density": "share of entries that travelled",
            "residual_norm": "sqrt(E|r|^2) of what clients keep back for later rounds (error feedback and the like)",
            "mask_churn": "share of the entries kept by the mask that it did not keep a round before",
            "clipped": "share of the accepted messages in which faults.norm cut it",
        },
    ),
    File(
        "bytes.jsonl",
        "The ledger: a row per round, phase, direction and layer, over all clients of the round. Its rows sum to "
        "bytes_up and bytes_down of metrics.jsonl, and to the totals that are printed, to the byte.",
        {
            "round": "from 0",
            "phase": '"round", or "probe": what a method asked all clients before the first round',
            "direction": '"up" or "down"',
            "layer": "a parameter, or _shared (headers, checksums, what belongs to no layer), _buffers, _moments (a "
            "norm per tensor, for the diagnostics and some methods), _<tree> for a tree of the method's own, _unused "
            "for answers that nobody owed",
            "bytes": "encoded",
        },
    ),
    File(
        "clients.jsonl",
        "By choice (run.keep_clients_log=true): a row per round and client of the cohort.",
        {
            "round": "from 0",
            "client": "its position in the data, from 0",
            "name": "its name",
            "examples": "it has",
            "steps": "local steps it made",
            "loss": "its mean training loss",
            "bytes_up": "it sent",
            "bytes_down": "it was sent",
            "refused": "code of the reason why its message was not used; null where it was",
        },
    ),
    File(
        "events.jsonl",
        "What happened beside the plan of things, a row each; empty in a quiet run.",
        {
            "event": '"refused": a message was not used; "skipped": a round was not; "resumed"; "passed over": a '
            'damaged checkpoint; "other cores"; "tracker failed"',
            "round": "from 0",
            "code": "`lamina explain CODE`",
            "client": "its name; empty where it is about the whole round",
            "layer": "the tensor or tree that is wrong, the first of them",
            "why": "what is wrong with it: expected and got",
            "message": "in words",
            "remedy": "what to do about it",
            "torch": "version with which it went on",
            "tracker": "that failed",
        },
    ),
    File(
        "split.json",
        "Who holds what.",
        {
            "data": "name of the data set",
            "partition": "the rule of the split",
            "split_sha256": "of which example each client holds: equal for equal splits",
            "pool_sha256": "of the examples, whoever holds them",
            "classes": "of labels; null where there are none",
            "label_names": "what the labels 0, 1, ... are called; null where they are numbers, or nothing names them",
            "clients": "a row per client",
            "clients.client": "its name",
            "clients.examples": "it has",
            "clients.labels": "examples per label, from 0 on; null where there are no labels",
        },
    ),
    File(
        "run.json",
        "The run in one document, replaced after every commit.",
        {
            "version": "of the run folder's format",
            "status": "running, done, failed or interrupted",
            "exit_code": "of the command; null while it runs",
            "error": "the error that ended it, with its code",
            "method": "names of the methods, joined by +",
            "method_repr": "the methods with all settings",
            "uplink": "codec of the updates",
            "downlink": "codec of the parameters sent down",
            "aggregate": "mean, or the rule that makes one update of the clients'",
            "personal": "the clients' own models are what is trained (personal layers)",
            "data": "name of the data set",
            "partition": "the rule of the split",
            "clients": "there are",
            "cohort": "clients drawn per round",
            "parameters": "trainable entries of the model",
            "seed": "every random number follows from it",
            "split_sha256": "as in split.json",
            "pool_sha256": "as in split.json",
            "initial_sha256": "of the model before the first round",
            "final_sha256": "of the model after the last one; null until then",
            "config_sha256": "of all keys that can change the result, as the run last went on; null without a config",
            "torch": "version, and what changes its bits",
            "engine": "that trained",
            "engine_reason": "why it was chosen",
            "workers": "processes",
            "cores": "of the machine",
            "tested": "there is a test set",
            "privacy": "differential privacy; null without",
            "privacy.*": "a setting; `sampling` is the probability of every client to be drawn in a round",
            "secure": "secure sums; null without",
            "secure.*": "a setting",
            "options": "how the run is kept",
            "options.evaluate_every": "rounds between two tests",
            "options.checkpoint_every": "rounds between two checkpoints, or auto",
            "options.keep_clients_log": "clients.jsonl is written",
            "options.track": "to which trackers the rounds are also given",
            "options.stop": "what ends the run before its last round",
            "options.stop.*": "its value",
            "rounds": "asked for",
            "rounds_done": "committed",
            "stopped": "what ended the run before its last round; absent where nothing did",
            "bytes_up": "in all committed rounds",
            "bytes_down": "the same, down",
            "best": "the round in sync with the highest accuracy",
            "final": "the last round in sync that was tested",
            "best.*": "as in metrics.jsonl",
            "final.*": "as in metrics.jsonl",
            "lengths": "bytes of each jsonl file that are committed; what lies behind is not read",
            "lengths.*": "of one file",
            "seconds": "since the start, over all resumptions",
            "started": "UTC",
            "updated": "UTC",
        },
    ),
    File(
        "env.json",
        "What it was made with. Nothing secret: values of options that look like secrets are left out of argv.",
        {
            "lamina": "version",
            "python": "version",
            "torch": "version",
            "numpy": "version",
            "safetensors": "version",
            "system": "operating system",
            "cpu": "model",
            "cores": "there are",
            "gpus": "models, where engine=cuda",
            "torch_threads": "of the process that ran it",
            "git": "commit of the working directory, and whether it was changed",
            "git.*": "commit, and whether it was changed",
            "argv": "the command",
            "data": "what a resumed run must find again",
            "data.*": "its name, split and checksums",
            "frozen": "SHA-256 of the parameters that are not trained; empty where all are",
            "config": "every key that can change a round",
            "config.*": "its value",
            "entries": "SHA-256 of the file of each entry",
            "entries.*": "of one key",
        },
    ),
    File("model.safetensors", "The final model, as `run.model` gives it: a state_dict. Written at the end."),
    File(
        "checkpoints/round-*/MANIFEST.json",
        "A checkpoint is a folder that is there whole or not at all; the newest two are kept, and that after the "
        "best round. Its manifest has the SHA-256 of its files, and of the manifests that it goes on from.",
        {
            "version": "of the format",
            "round": "rounds done",
            "parent": "the checkpoint before it; null for the first",
            "parent.*": "its rounds done, and the SHA-256 of its manifest",
            "best": "that after the best round; null where it is this one",
            "best.*": "as of the parent",
            "sha256": "of every file",
            "sha256.*": "of one file",
            "own": "SHA-256 of the manifest's text before this",
        },
    ),
    File("checkpoints/round-*/model.safetensors", "Parameters and buffers after that round."),
    File(
        "checkpoints/round-*/reference.safetensors",
        "The model after round 2, from which inertia is measured; linked from an earlier checkpoint, too.",
    ),
    File("checkpoints/round-*/server.safetensors", "What the method remembers at the server."),
    File(
        "checkpoints/round-*/clients.safetensors",
        "What clients remember, as far as the checkpoint before the last one does not have it. With "
        'store="disk:PATH" it lies there instead, and state.json says which rows.',
    ),
    File(
        "checkpoints/round-*/clients-*.safetensors",
        "What that checkpoint has of it: a hard link, so it takes no room of its own. The number is the round in which "
        "it was written.",
    ),
    File("checkpoints/round-*/state.json", "All else that a resumed run needs; its form is lamina's own."),
    File("chaos.json", "Of `lamina chaos`: what went wrong on purpose, and the account of what became of it."),
    File("crash.txt", "The traceback, after an error that lamina did not expect (E300)."),
    File("report.html", "The report, where `lamina report` was asked for it."),
    File("export/*", "What trackers were given (run.track), how far (given.json), and what `lamina export` wrote."),
    File("flower.json", "Of a run over Flower: under which name nodes keep what they remember."),
    File(
        "letters.json",
        "Of a run over Flower whose letters are signed: its name, and from where letters are numbered, so that none "
        "has a number again after the server was started anew. No key.",
    ),
    File(
        "flower.jsonl",
        "Of a run over Flower: what was really handed over, a row per round. docs/deployment.md explains it.",
    ),
    File(
        ".lock",
        "Locked while a process writes to the run, and says which: its number, the machine's name and which start of "
        "the machine it was. Empty otherwise.",
    ),
)


def find(word: str) -> File | None:
    """By its name, or by the end of it."""
    ends = word.rpartition("/")[2]
    whole = (file for file in FILES if file.name == word)
    return next(whole, next((file for file in FILES if file.name.rpartition("/")[2] == ends), None))


def described(path: str) -> File | None:
    """The entry for a file of a run folder, by its path in it."""
    return next((file for file in FILES if fnmatch.fnmatchcase(path, file.name)), None)


def lines(file: File, width: int | None) -> list[str]:
    shown = [f"  {file.name}", "", *paragraphs(file.about, width)]
    return [*shown, "", *fields(list(file.columns.items()), width)] if file.columns else shown


def every(width: int | None) -> list[str]:
    """All of them."""
    shown = ["  runs/<experiment>/<number>-<method>/    runs/latest is a link to the newest"]
    for file in FILES:
        shown += ["", *lines(file, width)]
    return shown
