// What an optimizer's groups and state held at one moment, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace looksam {

void bind_snapshot(pybind11::module_& module);

}  // namespace looksam
