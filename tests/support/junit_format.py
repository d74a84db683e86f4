"""The JUnit format of pytest's family xunit2, as Jenkins' xUnit plugin publishes it, and what xunit1 adds to it.

A table instead of an XML schema: no validator of those comes with Python. One thing is not in Jenkins' own: the
properties of a test case, which pytest writes there for its `record_property`.
"""

import re

COUNT, SECONDS, TEXT = r"\d+", r"\d+(\.\d+)?", r"(?s).*"
MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?([+-]\d\d:\d\d)?"
OUTCOMES = {"skipped", "error", "failure", "rerunFailure", "rerunError", "flakyFailure", "flakyError"}
CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": {"testsuite", "properties", "testcase", "system-out", "system-err"},
    "testcase": {"properties", "system-out", "system-err"} | OUTCOMES,
    "properties": {"property"},
}
REQUIRED = {
    "testsuites": {},
    "testsuite": {"name": TEXT, "tests": COUNT, "failures": COUNT, "errors": COUNT},
    "testcase": {"name": TEXT},
    "property": {"name": r".+", "value": TEXT},
}
OPTIONAL = {
    "testsuites": {"name": TEXT, "time": SECONDS, "tests": COUNT, "failures": COUNT, "errors": COUNT},
    "testsuite": {
        "skipped": COUNT, "time": SECONDS, "timestamp": MOMENT, "hostname": TEXT, "id": TEXT, "package": TEXT,
        "group": TEXT, "file": TEXT, "log": TEXT, "url": TEXT,
    },
    "testcase": {"classname": TEXT, "time": SECONDS, "group": TEXT},
    **{outcome: {"message": TEXT, "type": TEXT} for outcome in OUTCOMES},
}  # fmt: skip
XUNIT1 = {"file": TEXT, "line": COUNT, "url": TEXT}
"""What a test case has besides in pytest's family xunit1."""
FLAT = {"testsuites", "testsuite", "testcase", "properties", "property"}
"""Elements that hold no text of their own."""


def violations(element, *, xunit1=False):
    """Return what the format does not allow of an element and all that is in it, one line each."""
    tag, found = element.tag, []
    optional = OPTIONAL.get(tag, {}) | (XUNIT1 if xunit1 and tag == "testcase" else {})
    known = REQUIRED.get(tag, {}) | optional
    found += [f"{tag} lacks {name}" for name in REQUIRED.get(tag, {}) if name not in element.attrib]
    for name, value in element.attrib.items():
        if name not in known:
            found.append(f"{tag} has {name}")
        elif not re.fullmatch(known[name], value):
            found.append(f"{tag}: {name} is {value!r}")
    found += [f"{tag} has a child {child.tag}" for child in element if child.tag not in CHILDREN.get(tag, ())]
    tags = [child.tag for child in element]
    if "properties" in tags[1:]:
        found.append(f"{tag}: properties come first, and once")
    if tag in FLAT and (element.text or "").strip():
        found.append(f"{tag} holds text")
    return found + [line for child in element for line in violations(child, xunit1=xunit1)]
