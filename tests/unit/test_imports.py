"""What the import contract in pyproject.toml does not say: no file imports itself by way of others."""

import grimp
import networkx


def test_no_circles_between_files_those_for_types_alone_included() -> None:
    modules = grimp.build_graph("dora_dist")
    imports = [(name, other) for name in modules.modules for other in modules.find_modules_directly_imported_by(name)]
    circles = [c for c in networkx.strongly_connected_components(networkx.DiGraph(imports)) if len(c) > 1]
    assert len(imports) > 500
    assert not circles
