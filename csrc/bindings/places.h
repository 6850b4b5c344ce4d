// Where the tensors of a column are, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace looksam {

void bind_places(pybind11::module_& module);

}  // namespace looksam
