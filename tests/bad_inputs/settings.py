"""Values of a configuration that cannot be meant."""

from tests.bad_inputs.case import Folder, Table, Words

CASES = Table()

CASES.option("misspelt", "--data.trian", "a.json", says="did you mean data.train?")
CASES.option("no_records", "--data.train=nowhere.json", says='data.train = "nowhere.json": no such file', ranks=(1, 2))


@CASES.bad(says="config.json: line 1")
def not_json(folder: Folder) -> Words:
    folder.text("config.json", '{"model": }')
    return ["train", "--config", "config.json"]
