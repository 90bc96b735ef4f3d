"""What Compose gives Prometheus and Grafana fits together: files, paths, names and ports. Neither image is run here: what Grafana makes of its
files is checked against what its manual asks of them, and by a person where the images can be had (docs/operating.md)."""

import json
import posixpath
import re
from urllib.parse import urlsplit

import pytest
import yaml
from clusters import REPOSITORY

DASHBOARD = REPOSITORY / "container/dashboard"


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((REPOSITORY / "container/compose.yaml").read_text())["services"]


def mounts(service) -> dict:
    """By the path inside: the file or directory of container/dashboard that is seen there."""
    inside = {}
    for volume in service["volumes"]:
        prefix, path = volume["source"].rsplit("}", 1)
        assert prefix == "${BATON_DASHBOARD:-./dashboard", "it lies where BATON_DASHBOARD says, else beside the file"
        assert volume["type"] == "bind" and volume["read_only"] and volume["bind"] == {"create_host_path": False}
        inside[volume["target"]] = DASHBOARD / path.lstrip("/")
    return inside


def seen(service, path: str):
    """What a program inside reads at `path`."""
    for target, source in mounts(service).items():
        if path == target or path.startswith(target + "/"):
            return source / path[len(target) :].lstrip("/")
    return None


def container_port(service) -> int:
    return int(str(service["ports"][0]).rsplit(":", 1)[1])


def test_everything_that_is_mounted_is_there(services):
    for name in ("prometheus", "grafana"):
        for target, source in mounts(services[name]).items():
            assert source.exists(), f"{name}: {target} is to be {source}"


def test_images_are_pinned_and_ports_are_for_this_host_alone(services):
    for name in ("prometheus", "grafana"):
        assert re.search(r":v?\d+\.\d+\.\d+$", services[name]["image"]), services[name]["image"]
        assert services[name]["profiles"] == ["dashboard"]
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])


def test_prometheus_finds_its_rules_and_asks_the_api_servers(services):
    # The image starts with this one.
    config_path = "/etc/prometheus/prometheus.yml"
    config = yaml.safe_load(seen(services["prometheus"], config_path).read_text())
    for rules in config["rule_files"]:
        # Relative ones are beside the configuration.
        found = seen(services["prometheus"], posixpath.join(posixpath.dirname(config_path), rules))
        assert found and yaml.safe_load(found.read_text())["groups"]
    (job,) = config["scrape_configs"]
    (lookup,) = job["dns_sd_configs"]
    assert lookup["names"] == ["api-server"] and lookup["names"][0] in services
    assert lookup["port"] == container_port(services["api-server"])


def test_grafana_has_a_data_source_of_the_type_that_every_panel_asks_for(services):
    # Grafana reads all .yaml files of these two directories.
    directory = seen(services["grafana"], "/etc/grafana/provisioning/datasources")
    (file,) = directory.glob("*.yaml")
    told = yaml.safe_load(file.read_text())
    assert set(told) == {"apiVersion", "datasources"} and told["apiVersion"] == 1
    (source,) = told["datasources"]
    assert source["type"] == "prometheus" and source["access"] == "proxy" and source["isDefault"] is True
    address = urlsplit(source["url"])
    assert address.scheme == "http" and address.hostname in services and "prometheus" in services["grafana"]["depends_on"]
    assert address.port == container_port(services[address.hostname])

    board = json.loads((DASHBOARD / "baton.json").read_text())
    named = [panel["datasource"] for panel in board["panels"] if panel["type"] != "row"]
    named += [target["datasource"] for panel in board["panels"] for target in panel.get("targets", []) if "datasource" in target]
    named += [variable["datasource"] for variable in board["templating"]["list"] if "datasource" in variable]
    assert len(named) > 10
    assert all(one == {"type": source["type"], "uid": "${datasource}"} for one in named)
    # A list of the data sources of one type, which begins with the default.
    (variable,) = [variable for variable in board["templating"]["list"] if variable["name"] == "datasource"]
    assert variable["type"] == "datasource" and variable["query"] == source["type"] and variable["current"] == {}
    # It looks as often as there is something new.
    scraped = yaml.safe_load((DASHBOARD / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped


def test_grafana_reads_the_dashboard_and_opens_with_it(services):
    (file,) = seen(services["grafana"], "/etc/grafana/provisioning/dashboards").glob("*.yaml")
    told = yaml.safe_load(file.read_text())
    assert set(told) == {"apiVersion", "providers"} and told["apiVersion"] == 1
    (provider,) = told["providers"]
    assert provider["name"] and provider["type"] == "file"
    directory = provider["options"]["path"]
    boards = [target for target in mounts(services["grafana"]) if posixpath.dirname(target) == directory and target.endswith(".json")]
    assert boards == [services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]]
    board = json.loads(seen(services["grafana"], boards[0]).read_text())
    # Without these Grafana refuses a file, or makes a second dashboard of it at each start.
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 36 and board.get("id") is None
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["w"] > 0 and place["x"] + place["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
