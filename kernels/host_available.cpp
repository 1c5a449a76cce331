// How much memory is left: /proc/meminfo and the control groups' limits.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include "memory.h"

namespace lohan_fx {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();

// The names of one version of the memory controller.
struct Controller {
  const char* file_system;
  const char* mount_option;  // that the mount must have; empty for none
  std::vector<const char*> limits;
  const char* usage;
  std::vector<const char*> reclaimable;  // lines of memory.stat: page cache that can be dropped
};

const Controller kVersion1 = {"cgroup",
                              "memory",
                              {"memory.limit_in_bytes"},
                              "memory.usage_in_bytes",
                              {"total_inactive_file", "total_active_file"}};
const Controller kVersion2 = {"cgroup2",
                              "",
                              {"memory.max", "memory.high"},
                              "memory.current",
                              {"inactive_file", "active_file", "slab_reclaimable"}};

bool starts_with(const std::string& text, const std::string& prefix) {
  return text.compare(0, prefix.size(), prefix) == 0;
}

// The lines of a file; none when it cannot be read. C's files and no streams, here or below: where this
// module carries a C++ library of its own, streams stop working once another one (torch's) is loaded.
std::vector<std::string> lines_of(const std::string& path) {
  std::vector<std::string> lines;
  std::FILE* const file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return lines;
  char* line = nullptr;
  std::size_t room = 0;
  for (ssize_t length; (length = getline(&line, &room, file)) > 0;) {
    if (line[length - 1] == '\n') --length;
    lines.emplace_back(line, static_cast<std::size_t>(length));
  }
  std::free(line);
  std::fclose(file);
  return lines;
}

// The number that `text` begins with.
std::optional<std::uint64_t> parse_number(const std::string& text) {
  const std::size_t begin = std::min(text.find_first_not_of(" \t"), text.size());
  std::uint64_t number = 0;
  const auto result = std::from_chars(text.data() + begin, text.data() + text.size(), number);
  return result.ec == std::errc() ? std::optional(number) : std::nullopt;
}

// None when there is no such file, or no number in it ("max").
std::optional<std::uint64_t> read_number(const std::string& path) {
  const std::vector<std::string> lines = lines_of(path);
  return lines.empty() ? std::nullopt : parse_number(lines.front());
}

// The number after `key` in a file of "key number" lines.
std::optional<std::uint64_t> find_number(const std::string& path, const std::string& key) {
  for (const std::string& line : lines_of(path))
    if (starts_with(line, key + " ")) return parse_number(line.substr(key.size()));
  return std::nullopt;
}

bool has_word(const std::string& list, const std::string& word) {
  return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

// The words of a line between single spaces.
std::vector<std::string> words_of(const std::string& line) {
  std::vector<std::string> words;
  for (std::size_t at = 0; at <= line.size();) {
    const std::size_t end = std::min(line.find(' ', at), line.size());
    words.push_back(line.substr(at, end - at));
    at = end + 1;
  }
  return words;
}

// This process's group under the controller, as /proc/self/cgroup says it.
std::optional<std::string> group_of_self(const std::string& root, const Controller& controller) {
  for (const std::string& line : lines_of(root + "/proc/self/cgroup")) {  // number:controllers:path
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (*controller.mount_option ? has_word(controllers, controller.mount_option)
                                 : controllers.empty())
      return line.substr(second + 1);
  }
  return std::nullopt;
}

struct Mount {
  std::string root, point;  // `point` shows what is at `root` in the controller's own tree
};

std::optional<Mount> mount_of(const std::string& root, const Controller& controller) {
  for (const std::string& line : lines_of(root + "/proc/self/mountinfo")) {
    const std::size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    const std::vector<std::string> left = words_of(line), right = words_of(line.substr(dash + 3));
    if (left.size() < 5 || right.size() < 3) continue;
    const Mount mount{left[3], left[4]};
    const std::string &type = right[0], &options = right[2];
    if (type == controller.file_system &&
        (!*controller.mount_option || has_word(options, controller.mount_option)))
      return mount;
  }
  return std::nullopt;
}

// What one group leaves of its own limits.
std::uint64_t left_in(const std::string& group, const Controller& controller) {
  std::uint64_t limit = kUnlimited;
  for (const char* name : controller.limits)
    limit = std::min(limit, read_number(group + "/" + name).value_or(kUnlimited));
  const std::optional<std::uint64_t> usage = read_number(group + "/" + controller.usage);
  if (limit == kUnlimited || !usage) return kUnlimited;
  std::uint64_t reclaimable = 0;
  for (const char* name : controller.reclaimable)
    reclaimable += find_number(group + "/memory.stat", name).value_or(0);
  const std::uint64_t used = *usage - std::min(*usage, reclaimable);
  return limit - std::min(limit, used);
}

// The least that this process's group and those above it leave.
std::uint64_t left_in_groups(const std::string& root, const Controller& controller) {
  std::optional<std::string> group = group_of_self(root, controller);
  const std::optional<Mount> mount = mount_of(root, controller);
  if (!group || !mount) return kUnlimited;
  // In a container the mount may show only a part of the tree, down from our group.
  if (mount->root != "/")
    group = starts_with(*group + "/", mount->root + "/") ? group->substr(mount->root.size()) : "";
  const std::string top = root + mount->point;
  std::uint64_t least = kUnlimited;
  for (std::string path = top + (*group == "/" ? "" : *group);;
       path.erase(path.find_last_of('/'))) {
    least = std::min(least, left_in(path, controller));
    if (path.size() <= top.size()) return least;
  }
}

}  // namespace

std::uint64_t host_available_bytes(const std::string& root) {
  const std::uint64_t kib = find_number(root + "/proc/meminfo", "MemAvailable:").value_or(0);
  return std::min({kib * 1024, left_in_groups(root, kVersion1), left_in_groups(root, kVersion2)});
}

}  // namespace lohan_fx
