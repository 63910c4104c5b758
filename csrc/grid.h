// Windows and cells of a token grid, in plain integers.
#pragma once

#include "geometry.h"

namespace expedite_d2 {

struct Grid {
  WindowAxis rows;
  WindowAxis columns;
};

}  // namespace expedite_d2
