#include "models/child_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "base/check.h"

extern char** environ;

namespace gloam {
namespace {

constexpr auto kTick = std::chrono::milliseconds(200);

std::vector<char*> Pointers(std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (std::string& text : texts) pointers.push_back(text.data());
  pointers.push_back(nullptr);
  return pointers;
}

std::vector<std::string> MergedEnvironment(const ChildProcess& child) {
  std::vector<std::string> merged;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string text = *variable;
    bool replaced = false;
    for (const auto& [name, value] : child.environment) {
      replaced = replaced || text.starts_with(name + "=");
    }
    if (!replaced) merged.push_back(text);
  }
  for (const auto& [name, value] : child.environment) merged.push_back(name + "=" + value);
  return merged;
}

// In the child, after fork: only calls that are safe there. Reports execvpe's errno to `report`.
[[noreturn]] void Exec(char* const* arguments, char* const* environment, int output, int report) {
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  const int null = open("/dev/null", O_RDONLY);
  dup2(null, STDIN_FILENO);
  dup2(output, STDOUT_FILENO);
  dup2(output, STDERR_FILENO);
  execvpe(arguments[0], arguments, environment);
  const int error = errno;
  [[maybe_unused]] const ssize_t written = write(report, &error, sizeof(error));
  _exit(127);
}

}  // namespace

StatusOr<int> RunChild(const ChildProcess& child) {
  GLOAM_CHECK(!child.arguments.empty());
  std::vector<std::string> arguments = child.arguments;
  std::vector<std::string> environment = MergedEnvironment(child);
  const std::vector<char*> argv = Pointers(arguments);
  const std::vector<char*> envp = Pointers(environment);
  const int output = open(child.output.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (output < 0) {
    return Unavailable("{}: cannot write: {}", child.output.string(), std::strerror(errno));
  }
  int report[2];  // closed unread when exec succeeds
  if (pipe2(report, O_CLOEXEC) != 0) {
    close(output);
    return Unavailable("cannot make a pipe: {}", std::strerror(errno));
  }
  const pid_t pid = fork();
  if (pid == 0) Exec(argv.data(), envp.data(), output, report[1]);
  const int fork_error = errno;
  close(output);
  close(report[1]);
  int exec_error = 0;
  const bool failed = pid > 0 && read(report[0], &exec_error, sizeof(exec_error)) > 0;
  close(report[0]);
  if (pid < 0) {
    return Unavailable("cannot start {}: {}", arguments[0], std::strerror(fork_error));
  }

  int status = 0;
  pid_t ended = 0;
  while ((ended = waitpid(pid, &status, WNOHANG)) == 0) {
    if (child.tick) child.tick();
    std::this_thread::sleep_for(kTick);
  }
  if (ended < 0) return Unavailable("lost sight of {}: {}", arguments[0], std::strerror(errno));
  if (failed) {
    if (exec_error == ENOENT) return NotFound("the program {} is not on the PATH", arguments[0]);
    return Unavailable("cannot start {}: {}", arguments[0], std::strerror(exec_error));
  }
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

}  // namespace gloam
