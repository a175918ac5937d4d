"""The commands: a file for each verb, which `main.py` imports when it is called."""

TRAINING_VERBS = {
    "fit": "train from a recipe, then write the model folder, test and report",
    "validate": "evaluate a checkpoint on the recipe's validation sets",
    "test": "evaluate a checkpoint on the recipe's test sets, and report",
}
VERBS = {
    "recipes": "list, print or copy the recipes that come with the package",
    "prepare": "run a script that makes shards or retrieval sets; without a name, list them",
    "data": "inspect shards: counts, distributions, duplicates, leaks, a contact sheet",
    "check": "check a recipe before training: faults, parameters, steps, memory",
    "tune": "search over settings of a recipe with Optuna: pruned, resumable",
    "mine": "mine hard negatives for shards with a trained model",
    "evaluate": "evaluate a model on a benchmark at every budget; compare two evaluations",
    "export": "export a run to a folder that loads anywhere, or to the Hugging Face hub",
    "embed": "embed items into a store: streamed, resumable, on one or many processes",
    "search": "search items by text, image or both, at a budget",
    "index": "build an index for a large store, and measure which search plan it needs",
    "serve": "serve a web page that searches a store at any budget",
    "store": "merge the parts of a store; export it to Parquet or Lance; import it from there",
    "push": "push a store into a Qdrant server or cluster; resumable",
}
