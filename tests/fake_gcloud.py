"""A gcloud and a kubectl that remember: `python fake_gcloud.py FOLDER gcloud|kubectl WORD...`.

FOLDER/state.json has what exists, FOLDER/calls.jsonl each call. Like the real ones it refuses to create
twice, to create on what is not there, and to delete what others use or what is not there. FOLDER/fail_at
holds the number of the change that fails for want of a permission; with FOLDER/blind every look does.
"""

import json
import os
import sys

USES = {  # flag: the kind of thing that it names
    "--network": "compute networks",
    "--networks": "compute networks",
    "--subnet": "compute networks subnets",
    "--subnetwork": "compute networks subnets",
    "--router": "compute routers",
    "--address": "compute addresses",
    "--cluster": "container clusters",
    "--zone": "dns managed-zones",
    "--service-account": "iam service-accounts",
}
VERBS = {"describe", "create", "delete", "enable", "rm", "get-credentials", "apply", "get"}
VERBS |= {"add-iam-policy-binding", "remove-iam-policy-binding"}


def refuse(message: str) -> None:
    print(f"ERROR: {message}", file=sys.stderr)
    sys.exit(1)


class World:
    """What exists: `kind name` to the flags that it was made with; and who may do what on which of them."""

    def __init__(self, folder: str) -> None:
        self.folder, self.file = folder, f"{folder}/state.json"
        self.state = {"things": {}, "bindings": [], "changes": 0}
        if os.path.exists(self.file):
            with open(self.file) as file:
                self.state = json.load(file)

    def call(self, words: list[str]) -> None:
        with open(f"{self.folder}/calls.jsonl", "a") as log:
            log.write(json.dumps(words) + "\n")
        at = next(index for index, word in enumerate(words) if word in VERBS)
        kind, verb = " ".join(words[1:at]), words[at]
        names = [word for word in words[at + 1 :] if not word.startswith("--")]
        flags = dict(word.partition("=")[::2] for word in words[at + 1 :] if word.startswith("--"))
        key = " ".join([kind, *names] if kind else names)
        if verb in ("describe", "get"):
            if os.path.exists(f"{self.folder}/blind"):
                refuse("PERMISSION_DENIED: permission to look is missing")
            if key not in self.state["things"]:
                refuse(f"NOT_FOUND: {key}")
            return
        self.state["changes"] += 1
        if self.state["changes"] == self.fails_at():
            self.save()
            refuse("PERMISSION_DENIED: permission to change is missing")
        self.change(kind, verb, key, flags)
        self.save()

    def fails_at(self) -> int:
        if not os.path.exists(f"{self.folder}/fail_at"):
            return 0
        with open(f"{self.folder}/fail_at") as file:
            return int(file.read())

    def change(self, kind: str, verb: str, key: str, flags: dict[str, str]) -> None:
        things, bindings = self.state["things"], self.state["bindings"]
        if verb == "create":
            if kind == "iam service-accounts":
                key += f"@{os.environ['CLOUDSDK_CORE_PROJECT']}.iam.gserviceaccount.com"
            if key in things:
                refuse(f"ALREADY_EXISTS: {key}")
            for used in self.used_by(flags):
                if used not in things:
                    refuse(f"INVALID_ARGUMENT: {used} is missing")
            things[key] = flags
        elif verb in ("delete", "rm"):
            self.delete(key.replace("storage", "storage buckets") if verb == "rm" else key)
        elif verb == "enable":
            things.update({f"service {name}": {} for name in key.split()[1:]})
        elif verb == "add-iam-policy-binding":
            self.check_binding(kind, key, flags)
            bindings += [new] if (new := [key, flags["--member"], flags["--role"]]) not in bindings else []
        elif verb == "remove-iam-policy-binding":
            if (old := [key, flags["--member"], flags["--role"]]) not in bindings:
                refuse("Policy binding with the specified principal, role, and condition not found!")
            bindings.remove(old)
        elif verb == "apply" and "gateway-api-inference-extension" in key:
            things["crd inferencepools.inference.networking.k8s.io"] = {}

    def delete(self, key: str) -> None:
        things = self.state["things"]
        if key == "namespace cabochon":
            return
        if key not in things:
            refuse(f"NOT_FOUND: {key}")
        if key.startswith("container clusters"):  # pools and what runs there go with it
            for other in [name for name in things if name.startswith(("container node-pools", "crd "))]:
                del things[other]
        users = [name for name, flags in things.items() if key in self.used_by(flags)]
        if users:
            refuse(f"FAILED_PRECONDITION: {key} is used by {users}")
        del things[key]
        self.state["bindings"] = [entry for entry in self.state["bindings"] if entry[0] != key]

    def check_binding(self, kind: str, key: str, flags: dict[str, str]) -> None:
        things, member = self.state["things"], flags["--member"].removeprefix("serviceAccount:")
        if kind != "projects" and key not in things:
            refuse(f"NOT_FOUND: {key}")
        if "svc.id.goog" in member:
            if not any(name.startswith("container clusters") for name in things):
                refuse(f"INVALID_ARGUMENT: identity pool of {member} is missing")
        elif f"iam service-accounts {member}" not in things:
            refuse(f"INVALID_ARGUMENT: {member} is missing")

    @staticmethod
    def used_by(flags: dict[str, str]) -> set[str]:
        return {f"{USES[name]} {value.rpartition('/')[2]}" for name, value in flags.items() if name in USES}

    def save(self) -> None:
        with open(self.file, "w") as file:
            json.dump(self.state, file)


if __name__ == "__main__":
    World(sys.argv[1]).call(sys.argv[2:])
