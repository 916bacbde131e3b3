// The one header that a suite includes.
#pragma once

#include <doctest/doctest.h>

#include "common/testing/array.hpp"
#include "common/testing/cases.hpp"
#include "common/testing/compare.hpp"
#include "common/testing/recognise.hpp"
#include "common/testing/report.hpp"
